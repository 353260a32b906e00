"""The shapes of experts, named by model and use; tests, tuning and benchmarks read them here."""

from __future__ import annotations

from typing import NamedTuple


class GroupedCase(NamedTuple):
    """`rows` rows for each of `hit` of `experts` experts; y = x @ w[e].T, with `weights` matrices [n, k] an expert.

    Two weights are gate and up: y is their clamped SwiGLU, times a routing weight. blocks: how many rows a block may
    have. peer: what the peer's adapter calls the kernel for such a product, None where it has none.
    """

    name: str
    rows: int
    n: int
    k: int
    blocks: tuple[int, ...]
    weights: int = 1
    experts: int = 256
    hit: int = 256
    peer: str | None = None


class LayerCase(NamedTuple):
    """`tokens`, each routed to `top` of `experts` experts [i, d], [i, d] and [d, i]: FP8, or MXFP4."""

    name: str
    tokens: int
    d: int
    i: int
    experts: int
    top: int
    limit: float = 10.0
    mxfp4: bool = False


# V4-Flash: gate and up as one matrix, and down: name -> (n, k).
FLASH = {"gate_up": (4096, 4096), "down": (4096, 2048)}
D, I, EXPERTS, TOP = 4096, 2048, 256, 6  # noqa: E741
DECODE = tuple(
    GroupedCase(f"decode 256x{rows} {name}", rows, n, k, blocks, peer="masked")
    for rows, blocks in ((3, (8,)), (12, (16, 8)))
    for name, (n, k) in FLASH.items()
)
PREFILL = tuple(
    GroupedCase(f"prefill {experts}x{rows} {name}", rows, n, k, blocks, 1, experts, experts, "contiguous")
    for experts, rows, blocks in ((32, 256, (256, 128)), (64, 128, (128, 64)))
    for name, (n, k) in FLASH.items()
)
# The two products of a balanced layer: tokens -> experts that are hit, rows of each, rows of a block.
BALANCED: dict[int, tuple[int, int, tuple[int, ...]]] = {
    1: (6, 1, (8,)),
    16: (80, 1, (8,)),
    128: (256, 3, (8,)),
    4096: (256, 96, (128, 64, 32)),
}
PARTS = tuple(
    GroupedCase(f"layer {tokens} {name}", rows, n, k, blocks, weights, hit=hit)
    for tokens, (hit, rows, blocks) in BALANCED.items()
    for name, n, k, weights in (("swiglu", I, D, 2), ("down", D, I, 1))
)
# The same in MXFP4, whose kernel is one for any number of rows.
MXFP4_DECODE = tuple(
    GroupedCase(f"mxfp4 256x{rows} {name}", rows, n, k, (block,))
    for rows, block in ((3, 8), (12, 16))
    for name, (n, k) in FLASH.items()
)
MXFP4_PARTS = tuple(
    GroupedCase(f"mxfp4 layer {tokens} {name}", rows, n, k, blocks, weights, hit=hit)
    for tokens, (hit, rows, _) in BALANCED.items()
    for blocks in ([(8,)] if rows <= 8 else [(112,)])
    for name, n, k, weights in (("swiglu", I, D, 2), ("down", D, I, 1))
)
LAYERS = tuple(
    LayerCase(f"{name} {tokens} whole", tokens, D, I, EXPERTS, TOP, mxfp4=mxfp4)
    for name, mxfp4 in (("layer", False), ("mxfp4 layer", True))
    for tokens in BALANCED
)
# V4-Pro's, of one token, whose tiles are other numbers of those that multiprocessors have.
PRO_LAYERS = tuple(
    LayerCase(f"pro {name} 1 whole", 1, 7168, 3072, 384, TOP, mxfp4=mxfp4)
    for name, mxfp4 in (("layer", False), ("mxfp4 layer", True))
)
BENCH = DECODE + PREFILL + PARTS
MXFP4_BENCH = MXFP4_DECODE + MXFP4_PARTS

# Of the model that is shipped. Its experts are 64 wide, half a scale block: the layer fills them up.
SHIPPED = (
    GroupedCase("small swiglu", 1, 64, 256, (8,), 2, experts=8, hit=2),
    GroupedCase("small swiglu prefill", 75, 64, 256, (16,), 2, experts=8, hit=8),
)
# What a kernel gets wrong if it is wrong.
HOSTILE = (
    GroupedCase("one row of one expert", 1, 64, 128, (8,), experts=7, hit=1),
    GroupedCase("more rows than a block", 19, 192, 256, (8, 16), experts=5, hit=3),
    GroupedCase("whole blocks, one K block", 16, 128, 128, (8, 16), 2, experts=4, hit=4),
    GroupedCase("a tile and a row", 129, 128, 256, (128,), 2, experts=3, hit=2),
)

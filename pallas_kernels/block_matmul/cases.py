"""The shapes of the dense matmuls, named by model and use; tests, tuning and benchmarks read them here."""

from __future__ import annotations

from typing import NamedTuple


class MatmulCase(NamedTuple):
    """y [m, n] = x [m, k] @ w [n, k].T."""

    name: str
    m: int
    n: int
    k: int


# Dense projections: name -> (n, k).
FLASH = {
    "wq_a": (1024, 4096),
    "wq_b": (32768, 1024),
    "wkv": (512, 4096),
    "wo_b": (4096, 8192),
    "gate_up": (4096, 4096),
    "down": (4096, 2048),
}
# Of the model that is shipped. A K of 64 is half a scale block: the op fills it up.
SMALL = {
    "wq_a": (128, 256),
    "wq_b": (512, 128),
    "wkv": (64, 256),
    "wo_b": (256, 128),
    "e_proj": (256, 256),
    "indexer wq_b": (128, 128),
}
SHIPPED = tuple(MatmulCase(f"small {name} m={m}", m, n, k) for m in (1, 5, 300) for name, (n, k) in SMALL.items())
BENCH = tuple(
    MatmulCase(f"flash {name} m={m}", m, n, k) for m in (1, 16, 64, 128, 4096) for name, (n, k) in FLASH.items()
)
# What a kernel gets wrong if it is wrong: ragged m, one K block, the least weight, one tile and a bit.
HOSTILE = (
    MatmulCase("one of everything", 1, 64, 128),
    MatmulCase("m just above a few", 9, 192, 256),
    MatmulCase("m a prime", 131, 128, 384),
    MatmulCase("one K block", 128, 256, 128),
    MatmulCase("one tile and a row", 129, 256, 256),
    MatmulCase("weights of half a scale", 24, 320, 512),
)

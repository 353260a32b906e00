"""How a layer of one token cuts its two products up, and what they can take. Nothing here imports Pallas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pallas_kernels.block_matmul.problem import BLOCK, MOST_SHARES, SHARED_BYTES, WGMMA_ROWS
from pallas_kernels.block_matmul.tiling import FewRows
from pallas_kernels.grouped_matmul.tiling import GROUP, MOST_WARPGROUPS, SCALED, STAGE_BLOCKS, consumer_registers
from pallas_kernels.mosaic.launch import H100_SMS

ROWS = 8  # of wgmma's N, at least: of which one is the token's
STEP_BLOCKS = (1, 2, 4, 8)  # K blocks of a stage: what divides the groups that are quantised at once
ALIGNED = 1024  # bytes, at multiples of which arrays start in shared memory
REDUCED = 2048  # bytes that Mosaic keeps for reductions
SCALE_WORDS = SCALED // GROUP + 4  # of shared memory for a row of a weight, see Mxfp4Rows.table_words


@dataclass(frozen=True)
class Mxfp4Token:
    """Of fp4_one_token_sm90: K blocks a stage, buffers, and teams of consumers, each with 64 rows of every weight.

    turns: consumers of a team, which take stages by turns. shares: thread blocks, a cluster, that share out K.
    """

    blocks: int = 4
    stages: int = 4
    teams: int = 1
    turns: int = 1
    shares: int = 1

    def __post_init__(self) -> None:
        if self.blocks not in STAGE_BLOCKS:
            raise ValueError(f"{self}: a stage is one of {STAGE_BLOCKS} blocks of {BLOCK} columns")
        if self.warpgroups > MOST_WARPGROUPS:
            raise ValueError(f"{self}: at most {MOST_WARPGROUPS} consumers have registers enough")
        if self.turns > 1 and (self.blocks * BLOCK != SCALED or self.stages % self.turns):
            raise ValueError(f"{self}: by turns, stages are of {SCALED} columns, and each has as many of the buffers")

    @property
    def warpgroups(self) -> int:
        return self.teams * self.turns

    @property
    def registers(self) -> int:
        return consumer_registers(self.warpgroups)


@dataclass(frozen=True)
class OneToken:
    """Both products of one token's layer."""

    gate_up: FewRows | Mxfp4Token
    down: FewRows | Mxfp4Token


@dataclass(frozen=True)
class TokenProduct:
    """`weights` matrices [n, k] times a row; `terms` experts' products are added."""

    n: int
    k: int
    weights: int
    terms: int


def products(d: int, i: int, top: int) -> dict[str, TokenProduct]:
    """Of a layer with `top` of experts [i, d], [i, d] and [d, i], by the name that OneToken has for them."""
    return {"gate_up": TokenProduct(i, d, 2, 1), "down": TokenProduct(d, i, 1, top)}


def rows_of(tiling: FewRows | Mxfp4Token) -> int:
    """Of every weight, in a tile."""
    return WGMMA_ROWS * (tiling.teams if isinstance(tiling, Mxfp4Token) else tiling.warpgroups)


def reason(tiling: FewRows | Mxfp4Token, problem: TokenProduct) -> str | None:
    """Why the kernels cannot cut the product so; None if they can."""
    mxfp4 = isinstance(tiling, Mxfp4Token)
    each = rows_of(tiling)
    depth = tiling.blocks * BLOCK
    of_columns = max(depth, SCALED) if mxfp4 else depth
    of_all = of_columns * tiling.shares * (tiling.turns if mxfp4 else 1)
    if problem.n % each or problem.k % of_columns:
        return f"weights [{problem.n}, {problem.k}] are no multiples of [{each}, {of_columns}]"
    if problem.terms * problem.k % of_all:
        return f"{problem.terms} x {problem.k} columns are no multiple of {of_all}"
    if tiling.blocks not in STEP_BLOCKS:
        return f"{tiling.blocks} blocks a stage: one of {STEP_BLOCKS}"
    if tiling.shares > MOST_SHARES:
        return f"{tiling.shares} thread blocks share K: at most {MOST_SHARES}"
    if (shared := shared_bytes(tiling, problem)) > SHARED_BYTES:
        return f"{shared} bytes of shared memory, there are {SHARED_BYTES}"
    return None


def shared_bytes(tiling: FewRows | Mxfp4Token, problem: TokenProduct) -> int:
    columns, depth = problem.terms * problem.k // tiling.shares, tiling.blocks * BLOCK
    accumulator = problem.weights * WGMMA_ROWS * ROWS * 4
    exchanged = accumulator * tiling.shares * (tiling.shares > 1)
    arrays = [ROWS * columns, 4 * columns // BLOCK]  # the row and its scales
    if isinstance(tiling, FewRows):
        weights = problem.weights * rows_of(tiling) * depth
        arrays += [tiling.stages * weights, tiling.warpgroups * exchanged]
    else:
        rows = problem.weights * rows_of(tiling)
        weights, scales = rows * depth // 2, rows * (SCALED // GROUP)
        arrays += [tiling.stages * weights, tiling.stages * scales, rows * tiling.turns * SCALE_WORDS * 4]
        arrays += [tiling.teams * exchanged, tiling.teams * accumulator * (tiling.turns - 1)]
    return sum(-(-size // ALIGNED) * ALIGNED for size in arrays) + REDUCED


def default(d: int, i: int, top: int, *, mxfp4: bool) -> OneToken | None:
    """For `top` of experts [i, d], [i, d] and [d, i]; None where nothing fits.

    Of what was measured to be fastest for V4-Flash or V4-Pro, and fits, the first with the fewest rows for the busiest
    multiprocessor.
    """
    ways = (MXFP4_GATE_UP, MXFP4_DOWN) if mxfp4 else (GATE_UP, DOWN)
    first, second = (
        min((tiling for tiling in tried if reason(tiling, problem) is None), key=busiest(problem, top), default=None)
        for tried, problem in zip(ways, products(d, i, top).values(), strict=True)
    )
    return OneToken(first, second) if first and second else None


def busiest(problem: TokenProduct, top: int) -> Callable[[FewRows | Mxfp4Token], float]:
    """Of a product of `top` experts, the rows of a weight that a multiprocessor reads at most, by tiling."""

    def rows(tiling: FewRows | Mxfp4Token) -> float:
        each = rows_of(tiling)
        tiles = problem.n // each * (top // problem.terms)
        return -(-tiles // (H100_SMS // tiling.shares)) * each / tiling.shares

    return rows


# What `default` has to choose from.
GATE_UP = (
    *(FewRows(2, stages, 2) for stages in (3, 2)),
    *(FewRows(2, stages, 1) for stages in (5, 4, 3, 2)),
    FewRows(1, 2, 1),
)
DOWN = (
    *(FewRows(4, stages, 1, shares=2) for stages in (5, 4, 3, 2)),
    *(FewRows(blocks, 2, 1, shares=shares) for shares in (2, 1) for blocks in (4, 2, 1)),
)
MXFP4_GATE_UP = (
    *(Mxfp4Token(2, stages, 2) for stages in (4, 3, 2)),
    *(Mxfp4Token(4, stages, turns=2) for stages in (4, 2)),
    *(Mxfp4Token(blocks, stages) for blocks in (4, 2, 1) for stages in (4, 2)),
)
MXFP4_DOWN = (
    Mxfp4Token(4, 4, turns=4, shares=2),
    Mxfp4Token(4, 2, turns=2, shares=2),
    *(Mxfp4Token(4, 2, shares=shares) for shares in (2, 1)),
)

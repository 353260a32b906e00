"""How the MXFP4 kernel cuts a product of experts up, and what it can take. Nothing here imports Pallas."""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels.block_matmul.problem import BLOCK, MOST_COLUMNS, SHARED_BYTES, WGMMA_ROWS, Problem
from pallas_kernels.block_matmul.tiling import PRODUCER_REGISTERS, launch_registers

GROUP = 32  # columns of a weight scale
SCALED = 512  # columns whose weight scales are the 16 bytes that a copy has at least
AHEAD = 64  # rows of all slabs up to which a product is issued before the last is added: registers hold both
MOST_APART = 16  # rows of a block with a product for every 32 columns
MOST_REGISTERS = 232  # that the compiler is allowed to use of what a consumer has
STAGE_BLOCKS = (1, 2, 4)
# Of a stage where a row's bits must not depend on the tiling: in four passes, what is added when depends on this.
INVARIANT_BLOCKS = 2
MOST_STAGES, MOST_WARPGROUPS = 8, 4


@dataclass(frozen=True)
class Mxfp4Rows:
    """Of fp4_sm90: K blocks a stage, buffers, and consumers of `parts` x 64 rows of every weight each.

    shares: consumers that have the same rows, and take their stages by turns.
    folded: scales into the codes (mosaic/e2m1_folded.py); else, of few rows, every 32 columns are a product of their
    own (e2m1_apart.py).
    """

    blocks: int = 4
    stages: int = 4
    warpgroups: int = 2
    parts: int = 1
    shares: int = 1
    folded: bool = True

    def __post_init__(self) -> None:
        if self.blocks not in STAGE_BLOCKS:
            raise ValueError(f"{self}: a stage is one of {STAGE_BLOCKS} blocks of {BLOCK} columns")
        if self.warpgroups > MOST_WARPGROUPS:
            raise ValueError(f"{self}: at most {MOST_WARPGROUPS} consumers have registers enough")
        if self.shares < 1 or self.warpgroups % self.shares:
            raise ValueError(f"{self}: {self.warpgroups} consumers are no teams of {self.shares}")

    @property
    def teams(self) -> int:
        """Of consumers with the same rows."""
        return self.warpgroups // self.shares

    @property
    def rows(self) -> int:
        """Of every weight, in a tile."""
        return WGMMA_ROWS * self.teams * self.parts

    @property
    def table_words(self) -> int:
        """Of a consumer's shared memory for a row of a weight: codes times scales, of SCALED columns, or scales alone.

        Rows start at 16 bytes, and eight of them in different banks.
        """
        groups, blocks = SCALED // GROUP, SCALED // BLOCK
        return 2 * groups + blocks if self.folded else groups + 4

    @property
    def in_one_order(self) -> bool:
        """Whether what is added when, in four passes too, is the same for blocks of any number of rows.

        A consumer takes four passes for all of its slabs if one of them has to.
        """
        return self.folded and (self.shares, self.parts, self.blocks) == (1, 1, INVARIANT_BLOCKS)

    def takes_turns(self, k: int) -> bool:
        """Whether a team can divide the stages of K: each its own buffers, and columns that have scales in common."""
        return self.stages % self.shares == k % (SCALED * self.shares) == 0 and self.blocks * BLOCK == SCALED

    @property
    def registers(self) -> int:
        return consumer_registers(self.warpgroups)


def consumer_registers(warpgroups: int) -> int:
    """Of the thread of one of so many consumers: what the producer leaves."""
    there = launch_registers(warpgroups + 1) - PRODUCER_REGISTERS
    return min(MOST_REGISTERS, there // warpgroups // 8 * 8)


def mxfp4_reason(tiling: Mxfp4Rows, problem: Problem, itemsize: int = 2) -> str | None:
    """Why fp4_sm90 cannot cut the problem so, with results of `itemsize` bytes; None if it can."""
    each = tiling.rows
    if problem.n % each or problem.k % SCALED:
        return f"weights [{problem.n}, {problem.k}] are no multiples of [{each}, {SCALED}]"
    if not tiling.folded and problem.rows > MOST_APART:
        return f"blocks of {problem.rows} rows: at most {MOST_APART} with a product for every 32 columns"
    if tiling.shares > 1 and not tiling.takes_turns(problem.k):
        return (
            f"{tiling.shares} consumers by turns: stages of {SCALED} columns (here {tiling.blocks * BLOCK}), multiples "
            f"of {SCALED * tiling.shares} columns in all ({problem.k}) and of {tiling.shares} buffers ({tiling.stages})"
        )
    if problem.rows % 8 or not 0 < problem.rows <= MOST_COLUMNS:
        return f"blocks of {problem.rows} rows: a multiple of 8, at most {MOST_COLUMNS}"
    if (shared := _shared_bytes(tiling, problem, itemsize)) > SHARED_BYTES:
        return f"{shared} bytes of shared memory, there are {SHARED_BYTES}"
    return None


def default_mxfp4(problem: Problem, itemsize: int = 2, batch_invariant: bool = False) -> Mxfp4Rows | None:
    """The longest stage of which two buffers fit, in as many as do, for two consumers if they divide the weights.

    Products of many rows leave registers for short stages only; of one weight they have two slabs, so that x is read
    half as often. Of the fewest rows and one weight, there are four consumers (276 us for two's 280, and 286 for 313
    where they look codes up). Few rows have a product for every 32 columns, but where their bits are to be those of
    many.
    """
    many, alone = problem.rows * problem.weights > AHEAD, problem.weights == 1
    first = [(2, 2)] if many and alone and not batch_invariant else [(4, 1)] if alone and problem.rows <= 8 else []
    stage_blocks, folded = STAGE_BLOCKS, batch_invariant or problem.rows > MOST_APART
    if batch_invariant:
        stage_blocks = (INVARIANT_BLOCKS,)
    for warpgroups, parts in (*first, (2, 1), (1, 1)):
        for blocks in sorted(stage_blocks, reverse=not many):
            for stages in range(MOST_STAGES, 1, -1):
                tiling = Mxfp4Rows(blocks, stages, warpgroups, parts, folded=folded)
                if mxfp4_reason(tiling, problem, itemsize) is None:
                    return tiling
    return None


def _shared_bytes(tiling: Mxfp4Rows, problem: Problem, itemsize: int) -> int:
    each, depth = tiling.rows, tiling.blocks * BLOCK
    of_weights = each * problem.weights * (depth // 2 + SCALED // GROUP)
    of_rows = problem.rows * depth + tiling.blocks * (problem.rows + -problem.rows % 32) * 4
    written = problem.rows * WGMMA_ROWS * tiling.teams * itemsize
    tables = each * tiling.shares * problem.weights * tiling.table_words * 4
    sent = (tiling.shares - 1) * each * problem.weights * problem.rows * 4
    return tiling.stages * (of_weights + of_rows) + written + tables + sent

"""Which tiling a product gets: the nearest one that was measured, or a default that fits whatever divides."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pallas_kernels.block_matmul.problem import BLOCK, MOST_COLUMNS, MOST_SHARES, SHARED_BYTES, WGMMA_ROWS, Problem
from pallas_kernels.block_matmul.table import DENSE, TABLE, Entry, load
from pallas_kernels.block_matmul.tiling import FewRows, ManyRows
from pallas_kernels.block_matmul.weight_only_tiling import WeightOnly, weight_only_reason, weight_only_tilings
from pallas_kernels.mosaic.launch import H100_SMS

FEW = 32  # rows up to which the kernel for few of them is taken where nothing was measured
FAR = {"m": 8, "rows": 4}  # see `choose`
CONSUMERS = 2
ACCUMULATOR_REGISTERS = 96  # of a thread, for what is worth a try: the rest holds addresses and scales
LEAST_FINISHED = 16  # columns that a consumer stores: a swizzled tile of at least 32 bytes a row
CONSUMER_COLUMNS = (32, 64, 128)


def few_rows_tiling(m: int, n: int, k: int, weights: int = 1, *, table: Path = TABLE) -> FewRows | None:
    """Of decode_sm90 for m rows, which are padded to a multiple of 8.

    None where no tiling fits: n no multiple of 64, k none of 128, more than 256 rows or too many for shared memory.
    """
    problem = Problem(m, n, k, weights)
    entry = choose(load(table).get("few_rows", ()), problem, lambda t: few_rows_reason(t, problem) is None)
    return entry.tiling if entry else default_few_rows(problem)


def many_rows_tiling(m: int, n: int, k: int, weights: int = 1, *, table: Path = TABLE) -> ManyRows | None:
    """Of kernel_sm90 for m rows, which are padded to a multiple of its tile_m.

    None where no tiling fits: n no multiple of 64, k none of 128.
    """
    problem = Problem(m, n, k, weights)
    entry = choose(load(table).get("many_rows", ()), problem, lambda t: many_rows_reason(t, problem) is None)
    return entry.tiling if entry else default_many_rows(problem)


def dense_tiling(
    m: int, n: int, k: int, table: Path = TABLE, *, batch_invariant: bool = False
) -> FewRows | ManyRows | None:
    """Of whichever kernel the nearest measurement says is faster; None where neither fits.

    batch_invariant: of those alone that add a row's products in one order whatever m is, see `in_one_order`.
    """
    problem = Problem(m, n, k)
    entries = [entry for kind in DENSE for entry in load(table).get(kind, ())]
    entry = choose(entries, problem, lambda t: reason(t, problem) is None and (not batch_invariant or in_one_order(t)))
    if entry:
        return entry.tiling
    few = default_few_rows(problem) if m <= FEW else None
    return few or default_many_rows(problem)


def weight_only_tiling(
    problem: Problem, table: Path = TABLE, *, batch_invariant: bool = False, **how: Any
) -> WeightOnly | None:
    """Of weight_only_sm90, as measured nearby or by its model of time; None where none fits.

    batch_invariant: of those alone that add in one order, by the model unless it is this problem that was measured:
    of problems nearby, those that share out K are the fast ones.

    problem: its experts are groups of columns of x, each with rows of the weight of its own. how: what
    `weight_only_reason` takes.
    """

    def fits(tiling: WeightOnly) -> bool:
        return weight_only_reason(tiling, problem, **how) is None and (not batch_invariant or in_one_order(tiling))

    entries = load(table).get("weight_only", ())
    if batch_invariant:
        entries = [entry for entry in entries if entry.problem == problem]
    entry = choose(entries, problem, fits)
    return entry.tiling if entry else next(iter(weight_only_tilings(problem, fits, how.get("out_bytes", 2))), None)


def in_one_order(tiling: FewRows | ManyRows | WeightOnly) -> bool:
    """Whether the bits of a result are those of every other tiling of its product for which this is true.

    The kernels add the products of a K block of 128, times its scale, block after block. Those that share out K among
    thread blocks add what these found at the end, in another order. Transposing changes no bit: both kernels of FP8
    products multiply the same pairs.
    """
    return tiling.shares == 1


def choose(entries: Iterable[Entry], problem: Problem, fits: Callable[[Any], bool]) -> Entry | None:
    """The entry for `problem`, else for the nearest one, among those whose tiling fits; the fastest of equals.

    Near is first who has the same weights, then who differs by the smallest factors in all sizes together. Products of
    more than FAR times the rows, or fewer, are another regime: nothing is learnt from them.
    """
    found = [entry for entry in entries if fits(entry.tiling) and not _far(entry.problem, problem)]
    return min(
        found, key=lambda entry: (*_distance(entry.problem, problem), entry.us, str(entry.problem)), default=None
    )


def _distance(measured: Problem, wanted: Problem) -> tuple[bool, float]:
    same = all(getattr(measured, name) == getattr(wanted, name) for name in ("n", "k", "weights"))
    return not same, sum(math.log2(_apart(measured, wanted, field.name)) for field in dataclasses.fields(Problem))


def _far(measured: Problem, wanted: Problem) -> bool:
    return any(_apart(measured, wanted, name) > factor for name, factor in FAR.items())


def _apart(measured: Problem, wanted: Problem, name: str) -> float:
    """The factor between two sizes, 1 where a problem has none."""
    a, b = getattr(measured, name), getattr(wanted, name)
    return max(a / b, b / a) if a and b else 1.0


def reason(tiling: Any, problem: Problem) -> str | None:
    """Why the kernel of `tiling` cannot run the problem with it; None if it can."""
    if isinstance(tiling, WeightOnly):
        return weight_only_reason(tiling, problem)
    if isinstance(tiling, FewRows):
        return few_rows_reason(tiling, problem)
    return many_rows_reason(tiling, problem)


def few_rows_reason(tiling: FewRows, problem: Problem) -> str | None:
    """Why decode_sm90 cannot cut the problem so; None if it can."""
    rows, each, depth = _few_rows(problem), WGMMA_ROWS * tiling.warpgroups, BLOCK * tiling.blocks
    stage = depth * (each * problem.weights + rows)
    shared = tiling.stages * stage + each * rows * 2
    if tiling.shares > 1:
        shared += tiling.shares * problem.weights * each * rows * 4
    if problem.n % each or problem.k % (depth * tiling.shares):
        return f"weights [{problem.n}, {problem.k}] are no multiples of [{each}, {depth * tiling.shares}]"
    if tiling.shares > MOST_SHARES:
        return f"a cluster of {tiling.shares}: at most {MOST_SHARES}"
    if rows % 8 or rows > MOST_COLUMNS:
        return f"{rows} rows: a multiple of 8, at most {MOST_COLUMNS}"
    if shared > SHARED_BYTES:
        return f"{shared} bytes of shared memory, there are {SHARED_BYTES}"
    return None


def many_rows_reason(tiling: ManyRows, problem: Problem) -> str | None:
    """Why kernel_sm90 cannot cut the problem so; None if it can."""
    by_rows = tiling.split == "rows"
    rows, columns = tiling.tile_m // (CONSUMERS if by_rows else 1), tiling.tile_n // (1 if by_rows else CONSUMERS)
    down, across = (tiling.cluster, 1) if tiling.cluster_along == "rows" else (1, tiling.cluster)
    products = tiling.blocks * (rows // WGMMA_ROWS) * problem.weights
    shared = tiling.stages * BLOCK * (tiling.tile_m + tiling.tile_n * problem.weights)
    shared += CONSUMERS * WGMMA_ROWS * columns // tiling.shares * 2
    shared += (tiling.shares > 1) * tiling.tile_m * tiling.tile_n * problem.weights * 4
    depth = BLOCK * tiling.blocks * tiling.shares
    if tiling.stages < 2:
        return "one buffer: consumers may look for the next block before they give back the last"
    if (size := tiling.cluster * tiling.shares) > MOST_SHARES or tiling.shares.bit_count() > 1:
        return f"{tiling.shares} shares, a power of two, in a cluster of {size}: at most {MOST_SHARES}"
    if problem.n % (tiling.tile_n * across) or problem.k % depth:
        return f"weights [{problem.n}, {problem.k}] in tiles [{tiling.tile_n * across}, {depth}]"
    if problem.rows not in (0, tiling.rows):
        return f"blocks of {problem.rows} rows, tiles and clusters of {tiling.rows}"
    if down > 1 and problem.rows == 0 and (problem.experts > 1 or -(-problem.m // tiling.tile_m) % down):
        return f"{problem.m} rows are no whole clusters of {down} tiles, or of several experts"
    if rows % WGMMA_ROWS or columns not in CONSUMER_COLUMNS:
        return f"{rows} x {columns} for each consumer: rows of 64, columns 32, 64 or 128"
    if tiling.shares > 1 and (tiling.cluster > 1 or columns < LEAST_FINISHED * tiling.shares):
        return f"{tiling.shares} shares: no other cluster, and {LEAST_FINISHED} columns or more for each to finish"
    if problem.weights > 1 and not by_rows:
        return "the consumers of several weights share their columns"
    if products % tiling.in_flight or tiling.stages < tiling.blocks:
        return (
            f"{products} products in groups of {tiling.in_flight}, of {tiling.blocks} blocks in {tiling.stages} buffers"
        )
    return None if shared <= SHARED_BYTES else f"{shared} bytes of shared memory, there are {SHARED_BYTES}"


def default_few_rows(problem: Problem) -> FewRows | None:
    """As many bytes in flight as shared memory holds, in stages as long as accumulators have registers for."""
    rows = _few_rows(problem)
    for blocks in (4, 2, 1):
        accumulators = (blocks + 1) * problem.weights * rows // 2
        stage = blocks * BLOCK * (WGMMA_ROWS * problem.weights + rows)
        stages = min(16, (SHARED_BYTES - WGMMA_ROWS * rows * 2) // stage)
        if stages >= 2 and (accumulators <= ACCUMULATOR_REGISTERS or blocks == 1):
            tiling = FewRows(blocks, stages, 1)
            if few_rows_reason(tiling, problem) is None:
                return tiling
    return None


def default_many_rows(problem: Problem) -> ManyRows | None:
    """The tile with which the multiprocessor that gets most of them has least to do; of equals the largest."""
    tilings = (
        ManyRows(128, 256, 4, "columns"),
        ManyRows(128, 128, 6, "rows"),
        ManyRows(128, 128, 4, "rows"),
        ManyRows(64, 256, 4, "columns"),
        ManyRows(128, 64, 6, "rows"),
        ManyRows(64, 128, 6, "columns"),
        ManyRows(128, 256, 4, "columns", cluster=2, width=1),  # for blocks of two tiles
        ManyRows(128, 128, 4, "rows", cluster=2, width=1),
    )

    def work(tiling: ManyRows) -> int:
        tiles = -(-problem.m // tiling.tile_m) * (problem.n // tiling.tile_n)
        return -(-tiles // H100_SMS) * tiling.tile_m * tiling.tile_n

    fitting = [tiling for tiling in tilings if many_rows_reason(tiling, problem) is None]
    return min(fitting, key=work, default=None)


def padded_rows(m: int, tiling: FewRows | ManyRows) -> int:
    """m, up to whole tiles: what a kernel is called with where rows are not in blocks."""
    tile = 8 if isinstance(tiling, FewRows) else tiling.tile_m
    return -(-m // tile) * tile


def _few_rows(problem: Problem) -> int:
    return problem.rows or -(-problem.m // 8) * 8

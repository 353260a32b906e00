"""Tilings of the expert layer: how many rows a block has, and how both projections are cut."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pallas_kernels.block_matmul import table as tables
from pallas_kernels.block_matmul import tilings
from pallas_kernels.block_matmul.table import load
from pallas_kernels.block_matmul.tiling import FewRows, ManyRows
from pallas_kernels.block_matmul.tilings import Problem, choose
from pallas_kernels.grouped_matmul import one_token_tiling
from pallas_kernels.grouped_matmul.one_token_tiling import OneToken
from pallas_kernels.grouped_matmul.tiling import (
    Mxfp4Rows,
    default_mxfp4,
    mxfp4_reason,
)

TABLE = Path(__file__).with_name("tiling_h100.json")
BLOCK_ROWS = (8, 16, 32, 64, 128)  # what is tried
TILES = (64, 128)  # from which on a block can be a tile of the kernel for many rows
FEW = 64  # up to which it can be one of the kernel for few
# What is tried for MXFP4 weights. More than the last does not fit into registers for two weights.
MXFP4_ROWS = (8, 16, 32, 64, 112)


@dataclass(frozen=True)
class LayerRows:
    """Rows of a block. `table` knows it for problems with three weights: gate, up and down."""

    rows: int = 8


@dataclass(frozen=True)
class LayerTiling:
    """What grouped_matmul.kernel_sm90.experts takes."""

    rows: int
    gate_up: FewRows | ManyRows | Mxfp4Rows
    down: FewRows | ManyRows | Mxfp4Rows

    def __post_init__(self) -> None:
        if isinstance(self.gate_up, Mxfp4Rows) != isinstance(self.down, Mxfp4Rows):
            raise ValueError(f"{self}: weights are MXFP4 in both products, or in none")


KINDS: dict[str, type] = tables.KINDS | {"mxfp4": Mxfp4Rows, "layer": LayerRows, "mxfp4_layer": LayerRows}


def tiling(
    m: int, n: int, k: int, weights: int = 1, *, experts: int, rows: int, batch_invariant: bool = False
) -> FewRows | ManyRows | None:
    """Of a product of m rows in blocks of `rows`, one expert each: of the kernel that was measured to be faster.

    Without a measurement: the kernel for few rows, but for blocks of whole tiles of the other. None where none fits.
    batch_invariant: of those alone that add a row's products in one order.
    """

    def fits(found: FewRows | ManyRows) -> bool:
        return tilings.reason(found, problem) is None and (not batch_invariant or tilings.in_one_order(found))

    problem = Problem(m, n, k, weights, experts, rows)
    table = load(TABLE, tuple(KINDS.items()))
    entries = [entry for kind in ("few_rows", "many_rows") for entry in table.get(kind, ())]
    if entry := choose(entries, problem, fits):
        return entry.tiling
    few, many = tilings.default_few_rows(problem), tilings.default_many_rows(problem)
    return (many or few) if rows >= min(TILES) else few


def mxfp4_tiling(
    m: int, n: int, k: int, weights: int = 1, *, experts: int, rows: int, batch_invariant: bool = False
) -> Mxfp4Rows | None:
    """`tiling` for MXFP4 weights: as measured nearby, or as much as fits; None where none does."""
    problem = Problem(m, n, k, weights, experts, rows)

    def fits(found: Mxfp4Rows) -> bool:
        return (found.in_one_order or not batch_invariant) and mxfp4_reason(found, problem) is None

    entry = choose(load(TABLE, tuple(KINDS.items())).get("mxfp4", ()), problem, fits)
    return entry.tiling if entry else default_mxfp4(problem, batch_invariant=batch_invariant)


def block_rows(problem: Problem, options: tuple[int, ...]) -> int:
    """Of `options`, the rows of a block with which the nearest measurement was fastest; the first without one."""
    table = load(TABLE, tuple(KINDS.items()))
    entries = [entry for kind in ("few_rows", "many_rows") for entry in table.get(kind, ())]
    entry = choose([entry for entry in entries if entry.problem.rows in options], problem, lambda _: True)
    return entry.problem.rows if entry else options[0]


def layer_problem(tokens: int, top: int, experts: int, d: int, i: int) -> Problem:
    """How the table writes a layer of `tokens`, each of `top` experts [i, d], [i, d] and [d, i]."""
    return Problem(tokens * top, i, d, weights=3, experts=experts)


def layer_tiling(
    tokens: int,
    top: int,
    experts: int,
    d: int,
    i: int,
    *,
    rows: int | None = None,
    mxfp4: bool = False,
    batch_invariant: bool = False,
) -> LayerTiling | OneToken | None:
    """Of a layer with blocks of `rows`; None: as many as was measured to be best, or as an expert has on average.

    One token has kernels of its own, but where rows are given or its bits are to be those it has among others. mxfp4:
    what the weights are; else FP8. None where no tiling fits: d or i no multiple of 128, or of 512 for MXFP4.
    """
    if tokens == 1 and rows is None and not batch_invariant:
        if found := one_token_tiling.default(d, i, top, mxfp4=mxfp4):
            return found
    m = tokens * top
    of_block = rows or _rows_of_layer(layer_problem(tokens, top, experts, d, i), mxfp4)
    how = {"experts": experts, "rows": of_block, "batch_invariant": batch_invariant}
    of_product = mxfp4_tiling if mxfp4 else tiling
    gate_up, down = of_product(m, i, d, weights=2, **how), of_product(m, d, i, **how)
    return LayerTiling(of_block, gate_up, down) if gate_up and down else None


def _rows_of_layer(problem: Problem, mxfp4: bool) -> int:
    """As measured, else the smallest block that the rows of an average expert fit into."""
    kind, largest = ("mxfp4_layer", max(MXFP4_ROWS)) if mxfp4 else ("layer", max(TILES))
    if entry := choose(load(TABLE, tuple(KINDS.items())).get(kind, ()), problem, lambda _: True):
        return entry.tiling.rows
    each = problem.m / min(problem.experts, problem.m)
    return next((rows for rows in (8, 16, 32) if each <= rows), largest)

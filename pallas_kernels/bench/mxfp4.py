"""Benchmarks of MXFP4 experts: FP8 rows sorted by expert, weights read packed. No peer has such a kernel."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.bench import grouped_matmul
from pallas_kernels.bench.case import Bench, Choice
from pallas_kernels.bench.grouped_matmul import Rows
from pallas_kernels.bench.operands import mxfp4_weights_of
from pallas_kernels.block_matmul.problem import Problem
from pallas_kernels.grouped_matmul import tilings
from pallas_kernels.grouped_matmul.cases import MXFP4_BENCH, GroupedCase
from pallas_kernels.grouped_matmul.fp4_sm90 import expert_rows
from pallas_kernels.grouped_matmul.rows_sm90 import arranged
from pallas_kernels.grouped_matmul.tiling import AHEAD, MOST_APART, MOST_STAGES, STAGE_BLOCKS, Mxfp4Rows, mxfp4_reason
from pallas_kernels.mosaic.scales import scale_bytes


class Inputs(NamedTuple):
    """Rows, and their codes and scales as the kernel takes them: by rows of a block, and whether scales are folded."""

    made: Rows
    arranged: dict[tuple[int, bool], tuple[jax.Array, jax.Array]]


def benches() -> Iterator[Bench]:
    return map(bench, MXFP4_BENCH)


def bench(case: GroupedCase) -> Bench:
    m, per_weight = case.hit * case.rows, case.n * case.k
    ways = {str(tiling): (rows, tiling) for rows in case.blocks for tiling in _tilings(case, rows)}
    return Bench(
        op="grouped_matmul",
        name=case.name,
        inputs=functools.partial(inputs, case),
        shared=functools.partial(mxfp4_weights_of, (case.experts, case.n, case.k), case.weights),
        ours={name: functools.partial(run, *way) for name, way in ways.items()},
        choices={
            name: Choice("mxfp4", Problem(m, case.n, case.k, case.weights, case.experts, rows), tiling)
            for name, (rows, tiling) in ways.items()
        },
        xla={},
        reference=functools.partial(reference, case),
        part=functools.partial(grouped_matmul.checked_rows, case),
        nbytes=case.hit * (case.weights * per_weight * 17 // 32 + case.rows * (case.k + 2 * case.n)),
        flops=2 * m * per_weight * case.weights,
        shape=dict(zip(("m", "n", "k"), (m, case.n, case.k), strict=True))
        | {"weights": case.weights, "experts": case.experts, "hit": case.hit, "rows": case.rows},
    )


def _tilings(case: GroupedCase, rows: int) -> Iterator[Mxfp4Rows]:
    """The layer's first, then every cut with as many buffers as fit."""
    m = case.hit * case.rows
    problem = Problem(m, case.n, case.k, case.weights, case.experts, rows)
    if found := tilings.mxfp4_tiling(m, case.n, case.k, case.weights, experts=case.experts, rows=rows):
        yield found
    many = rows * case.weights > AHEAD
    shared = (1, 2, 4) if grouped_matmul.few_tiles(case) else (1,)
    for cut in itertools.product((1, 2, 4), (1, 2) if many else (1,), STAGE_BLOCKS, shared, _ways(rows)):
        warpgroups, parts, blocks, shares, way = cut
        if warpgroups % shares:
            continue
        buffers = range(MOST_STAGES, 1, -1)
        tried = (Mxfp4Rows(blocks, stages, warpgroups, parts, shares, way) for stages in buffers)
        yield from [tiling for tiling in tried if mxfp4_reason(tiling, problem) is None][:1]


def _ways(rows: int) -> tuple[bool, ...]:
    """Whether scales are folded: as it can be for blocks of so many rows."""
    return (True, False) if rows <= MOST_APART else (True,)


def inputs(case: GroupedCase, key: jax.Array) -> Inputs:
    made = grouped_matmul.inputs(case, key)
    ways = [(rows, way) for rows in made.x for way in _ways(rows)]

    def arrange(rows: int, way: bool) -> tuple[jax.Array, jax.Array]:
        return arranged(made.x[rows].values, scale_bytes(made.x[rows].scale), rows, folded=way)

    return Inputs(made, {way: arrange(*way) for way in ways})


def reference(case: GroupedCase, sets: tuple[Inputs, Any]) -> jax.Array:
    return grouped_matmul.reference(case, (sets[0].made, sets[1]))


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(rows: int, tiling: Mxfp4Rows, sets: tuple[Inputs, Any]) -> jax.Array:
    (made, of_blocks), weights = sets
    pairs = [(w.values, scale_bytes(w.scale)) for w in weights]
    how: dict[str, Any] = {"rows": rows, "out_dtype": jnp.bfloat16, "row_blocks": made.blocks[rows]}
    if len(weights) == 2:
        how |= {"factors": made.factors[rows], "epilogue": functools.partial(grouped_matmul.gated, True)}
    return expert_rows(*of_blocks[rows, tiling.folded], pairs, tiling, **how)

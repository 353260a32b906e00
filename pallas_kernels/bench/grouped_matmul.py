"""Benchmarks of experts: one product, with rows sorted by expert beforehand as the peer takes them; and the layer.

Weights are far larger than the L2 cache and made once; input sets differ in their rows and in the experts they hit.
Checked are the rows of a few experts: dequantising all of them would not fit into memory.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench import expert_layer
from pallas_kernels.bench.block_matmul import few_rows_tilings, many_rows_tilings
from pallas_kernels.bench.case import Bench, Choice
from pallas_kernels.bench.operands import weights_of
from pallas_kernels.block_matmul.decode_sm90 import few_rows
from pallas_kernels.block_matmul.kernel_sm90 import many_rows
from pallas_kernels.block_matmul.problem import WGMMA_ROWS, Problem
from pallas_kernels.block_matmul.row_blocks import RowBlocks
from pallas_kernels.block_matmul.tiling import FewRows, ManyRows
from pallas_kernels.grouped_matmul import tilings
from pallas_kernels.grouped_matmul.cases import BENCH, LAYERS, PRO_LAYERS, GroupedCase
from pallas_kernels.mosaic.launch import H100_SMS
from pallas_kernels.mosaic.scales import scale_bytes
from pallas_kernels.quant import FP8_GROUP, QuantTensor, dequantize, quantize
from pallas_kernels.swiglu import swiglu

LIMIT = 10.0


class Rows(NamedTuple):
    """By rows of a block: x [blocks x rows, k] with zeros for padding, its scales transposed, factors, and blocks.

    expert int32 [hit]: which experts the rows belong to, in order.
    """

    x: dict[int, QuantTensor]
    tokens_last: dict[int, jax.Array]
    factors: dict[int, jax.Array]
    blocks: dict[int, RowBlocks]
    expert: jax.Array


def benches() -> Iterator[Bench]:
    yield from map(bench, BENCH)
    yield from map(expert_layer.bench, LAYERS + PRO_LAYERS)
    yield from map(expert_layer.routed, LAYERS)


def bench(case: GroupedCase) -> Bench:
    m, per_weight = case.hit * case.rows, case.n * case.k
    ways = dict(_ways(case))
    chosen = _chosen(case)
    return Bench(
        op="grouped_matmul",
        name=case.name,
        inputs=functools.partial(inputs, case),
        shared=functools.partial(weights_of, (case.experts, case.n, case.k), case.weights),
        ours={name: functools.partial(run, *way) for name, way in ways.items()},
        choices={
            name: Choice(
                "few_rows" if isinstance(tiling, FewRows) else "many_rows",
                Problem(m, case.n, case.k, case.weights, case.experts, rows),
                tiling,
            )
            for name, (rows, tiling) in ways.items()
        },
        chosen=chosen if chosen in ways else None,
        xla={"dequantised bf16": dequantised, "plain fp8 dot": plain_dot} if case.hit == case.experts else {},
        reference=functools.partial(reference, case),
        part=functools.partial(checked_rows, case),
        nbytes=case.hit * (case.weights * per_weight + case.rows * (case.k + 2 * case.n)),
        flops=2 * m * per_weight * case.weights,
        peer=(case.peer, case.experts, case.rows, case.n, case.k) if case.peer else None,
        shape=dict(zip(("m", "n", "k"), (m, case.n, case.k), strict=True))
        | {"weights": case.weights, "experts": case.experts, "hit": case.hit, "rows": case.rows},
    )


def _ways(case: GroupedCase) -> Iterator[tuple[str, tuple[int, FewRows | ManyRows]]]:
    """Rows of a block and tiling, by name: the table's first, then every one that is worth a try."""
    m = case.hit * case.rows
    for rows in case.blocks:
        problem = Problem(m, case.n, case.k, case.weights, case.experts, rows)
        of_table = tilings.tiling(m, case.n, case.k, case.weights, experts=case.experts, rows=rows)
        tried = [] if of_table is None else [of_table]
        if rows <= tilings.FEW:  # with tiles enough, K shared out was measured to be slower throughout
            tried += [tiling for tiling in few_rows_tilings(problem) if tiling.shares == 1 or few_tiles(case)]
        tried += many_rows_tilings(problem)
        yield from ((_name(rows, tiling), (rows, tiling)) for tiling in tried)


def few_tiles(case: GroupedCase) -> bool:
    """Whether every multiprocessor has so few tiles of 64 rows that one more or less counts."""
    return case.hit * case.n // WGMMA_ROWS <= 4 * H100_SMS


def _chosen(case: GroupedCase) -> str | None:
    m = case.hit * case.rows
    rows = tilings.block_rows(Problem(m, case.n, case.k, case.weights, case.experts), case.blocks)
    found = tilings.tiling(m, case.n, case.k, case.weights, experts=case.experts, rows=rows)
    return None if found is None else _name(rows, found)


def _name(rows: int, tiling: FewRows | ManyRows) -> str:
    return f"rows={rows} {tiling}"


def inputs(case: GroupedCase, key: jax.Array) -> Rows:
    of_x, of_factors, of_experts = jax.random.split(key, 3)
    x = jax.random.normal(of_x, (case.hit, case.rows, case.k))
    factors = jax.random.uniform(of_factors, (case.hit, case.rows), minval=0.1)
    expert = jnp.sort(jax.random.permutation(of_experts, case.experts)[: case.hit]).astype(jnp.int32)
    made = Rows({}, {}, {}, {}, expert)
    for rows in case.blocks:
        each = -(-case.rows // rows)
        padding = ((0, 0), (0, each * rows - case.rows))
        made.x[rows] = quantize(jnp.pad(x, (*padding, (0, 0))).reshape(-1, case.k), FP8_GROUP)
        made.tokens_last[rows] = scale_bytes(made.x[rows].scale).T
        made.factors[rows] = jnp.pad(factors, padding).reshape(-1)
        made.blocks[rows] = RowBlocks(jnp.repeat(expert, each), jnp.full(1, case.hit * each, jnp.int32))
    return made


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(rows: int, tiling: FewRows | ManyRows, sets: tuple[Rows, Any]) -> jax.Array:
    made, weights = sets
    x, pairs = made.x[rows], [(w.values, scale_bytes(w.scale)) for w in weights]
    how: dict[str, Any] = {"out_dtype": jnp.bfloat16, "row_blocks": made.blocks[rows]}
    if len(weights) == 2:
        how |= {"factors": made.factors[rows], "epilogue": functools.partial(gated, isinstance(tiling, FewRows))}
    if isinstance(tiling, FewRows):
        return few_rows(x.values, made.tokens_last[rows], pairs, tiling, rows=rows, **how)
    return many_rows(x.values, scale_bytes(x.scale), pairs, tiling, **how)


def gated(tokens_last: bool, gate: jax.Array, up: jax.Array, factor: jax.Array) -> jax.Array:
    """What the layer makes of gate and up in the kernel."""
    gate, up = jnp.minimum(gate, LIMIT), jnp.clip(up, -LIMIT, LIMIT)
    hidden = gate / (1 + jnp.exp(-gate)) * up
    return hidden * jax.lax.broadcast_in_dim(factor, hidden.shape, (1 if tokens_last else 0,))


def checked_rows(case: GroupedCase, y: jax.Array) -> jax.Array:
    """The real rows of the experts that are checked, [experts x rows, n]."""
    y = y.reshape(case.hit, -1, case.n)
    return y[np.array(_checked(case)), : case.rows].reshape(-1, case.n)


def _checked(case: GroupedCase) -> list[int]:
    """Places among the experts that were hit: the first, the last and one between."""
    return sorted({0, case.hit // 2, case.hit - 1})


@functools.partial(jax.jit, static_argnums=0)
def reference(case: GroupedCase, sets: tuple[Rows, Any]) -> jax.Array:
    made, weights = sets
    rows = case.blocks[0]
    x = dequantize(made.x[rows]).reshape(case.hit, -1, case.k)
    factors = made.factors[rows].reshape(case.hit, -1)
    found = []
    for at in _checked(case):
        picked = (jax.tree.map(lambda leaf: leaf[made.expert[at]], w) for w in weights)  # noqa: B023
        y = [jnp.matmul(x[at, : case.rows], dequantize(w).T, precision="highest") for w in picked]
        found.append(y[0] if len(y) == 1 else swiglu(y[0], y[1], LIMIT) * factors[at, : case.rows, None])
    return jnp.concatenate(found)


@jax.jit
def dequantised(sets: tuple[Rows, Any]) -> Any:
    """Every expert having equally many rows, padding included, XLA's best is a batched product."""
    made, weights = sets
    x = dequantize(made.x[min(made.x)], jnp.bfloat16)
    x = x.reshape(len(made.expert), -1, x.shape[-1])
    return [_batched(x, dequantize(w, jnp.bfloat16)) for w in weights]


@jax.jit
def plain_dot(sets: tuple[Rows, Any]) -> Any:
    """The codes alone, without their scales."""
    made, weights = sets
    x = made.x[min(made.x)].values
    x = x.reshape(len(made.expert), -1, x.shape[-1])
    return [_batched(x, w.values) for w in weights]


def _batched(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, w, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.bfloat16)

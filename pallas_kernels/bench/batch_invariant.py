"""What it costs that a row's bits do not depend on the others: products by the tilings that add in one order.

The column of XLA has the tiling that is fastest without that promise. Right is who gives the first row the bits that
it has in a batch of another size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.bench import block_matmul, expert_layer, weight_only
from pallas_kernels.bench.case import Bench
from pallas_kernels.bench.weight_only import WeightOnlyCase
from pallas_kernels.block_matmul.cases import FLASH, MatmulCase
from pallas_kernels.block_matmul.problem import Problem
from pallas_kernels.block_matmul.tilings import dense_tiling, weight_only_tiling
from pallas_kernels.grouped_matmul.cases import LAYERS, LayerCase
from pallas_kernels.grouped_matmul.tilings import layer_tiling

ROWS = (1, 128, 4096)
OTHER = {1: 129}  # rows of the other batch, 1 where it is not here
DENSE = tuple(MatmulCase(f"{name} m={m}", m, n, k) for m in ROWS for name, (n, k) in FLASH.items())
WEIGHT_ONLY = tuple(WeightOnlyCase(f"weight-only {case.name}", *case[1:]) for case in DENSE)


def benches() -> Iterator[Bench]:
    yield from map(dense, DENSE)
    yield from map(of_weight_only, WEIGHT_ONLY)
    yield from map(layer, LAYERS)


class Batches(NamedTuple):
    """How a case of m rows runs in this mode. tiling(rows, batch_invariant=...): None where none fits.

    inputs(rows, key): operands of batches of these numbers of rows, which begin alike. run(tiling, rows, operands of
    one batch).
    """

    m: int
    tiling: Callable[..., Any]
    inputs: Callable[[tuple[int, int], jax.Array], Any]
    run: Callable[[Any, int, Any], jax.Array]


def dense(case: MatmulCase) -> Bench:
    def inputs(rows: tuple[int, int], key: jax.Array) -> Any:
        of_x, of_w = jax.random.split(key)
        values, w = jax.random.normal(of_x, (max(rows), case.k)), block_matmul.weight(case, of_w)
        return tuple(block_matmul.operands(values[:m], w) for m in rows)

    def tiling(m: int, **how: Any) -> Any:
        return dense_tiling(m, case.n, case.k, **how)

    return bench(block_matmul.bench(case), Batches(case.m, tiling, inputs, block_matmul.run))


def of_weight_only(case: WeightOnlyCase) -> Bench:
    def inputs(rows: tuple[int, int], key: jax.Array) -> Any:
        of_x, of_w = jax.random.split(key)
        values, w = jax.random.normal(of_x, (max(rows), case.k), jnp.bfloat16), weight_only.weight(case, of_w)
        return tuple(weight_only.operands(values[:m], w, (tiling(m), tiling(m, batch_invariant=True))) for m in rows)

    def tiling(m: int, **how: Any) -> Any:
        return weight_only_tiling(Problem(m, case.n, case.k, experts=1), **how)

    return bench(weight_only.bench(case), Batches(case.m, tiling, inputs, weight_only.run))


def layer(case: LayerCase) -> Bench:
    def inputs(tokens: tuple[int, int], key: jax.Array) -> Any:
        x, routing = expert_layer.inputs(case._replace(tokens=max(tokens)), key)
        return tuple((x[:n], expert_layer.first_of(routing, n)) for n in tokens)

    def tiling(tokens: int, **how: Any) -> Any:
        return layer_tiling(tokens, case.top, case.experts, case.d, case.i, mxfp4=case.mxfp4, **how)

    def run(tiling: Any, tokens: int, sets: Any) -> jax.Array:
        del tokens
        return expert_layer.run(case.limit, tiling, sets)

    return bench(expert_layer.bench(case), Batches(case.tokens, tiling, inputs, run))


def bench(plain: Bench, batches: Batches) -> Bench:
    """`plain` in this mode."""
    m, other = batches.m, OTHER.get(batches.m, 1)
    free = batches.tiling(m)
    here, there = (batches.tiling(rows, batch_invariant=True) for rows in (m, other))

    def run(tiling: Any, which: int, sets: Any) -> jax.Array:
        of_batches, shared = sets if plain.shared else (sets, None)
        operands = of_batches[which] if shared is None else (of_batches[which], shared)
        return batches.run(tiling, (m, other)[which], operands)

    assert free is not None and here is not None and there is not None, f"no tiling fits {plain.name}"
    return dataclasses.replace(
        plain,
        name=f"batch-invariant {plain.name}",
        inputs=functools.partial(batches.inputs, (m, other)),
        ours={str(here): functools.partial(run, here, 0)},
        choices={},
        chosen=None,
        xla={f"fastest {free}": functools.partial(run, free, 0)},
        reference=lambda sets: run(there, 1, sets)[:1],
        judge=same_bits,
        peer=None,
    )


def same_bits(got: Any, want: Any) -> str | None:
    different = int(
        jnp.sum(jax.lax.bitcast_convert_type(got, jnp.uint16) != jax.lax.bitcast_convert_type(want, jnp.uint16))
    )
    return f"{different} of {got.size} results have other bits in a batch of another size" if different else None

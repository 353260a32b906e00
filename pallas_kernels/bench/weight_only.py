"""Benchmarks of bfloat16 rows by FP8 weights, dense and in groups as the output projection is. No peer has them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.bench.case import Bench, Choice
from pallas_kernels.block_matmul import weight_only_sm90
from pallas_kernels.block_matmul.cases import FLASH
from pallas_kernels.block_matmul.problem import Problem
from pallas_kernels.block_matmul.tilings import weight_only_reason, weight_only_tiling, weight_only_tilings
from pallas_kernels.block_matmul.weight_only_tiling import WeightOnly
from pallas_kernels.mosaic.scales import scale_bytes
from pallas_kernels.quant import FP8_BLOCK, QuantTensor, dequantize, quantize

TRIED = 8  # of the tiles that are said to be fastest
ROWS = (1, 128, 4096)


class WeightOnlyCase(NamedTuple):
    """y [m, groups x n] = x [m, groups x k] by the weights [groups, n, k], group by group."""

    name: str
    m: int
    n: int
    k: int
    groups: int = 1


SHAPES = {name: (*size, 1) for name, size in FLASH.items()} | {"wo_a": (1024, 4096, 8)}
BENCH = tuple(
    WeightOnlyCase(f"weight-only {name} m={m}", m, n, k, groups)
    for m in ROWS
    for name, (n, k, groups) in SHAPES.items()
)


class Operands(NamedTuple):
    """x by the number of rows that a tiling asks for, with zeros behind the real ones; w [groups x n, k]."""

    x: dict[int, jax.Array]
    w: QuantTensor


def benches() -> Iterator[Bench]:
    return map(bench, BENCH)


def bench(case: WeightOnlyCase) -> Bench:
    problem = Problem(case.m * case.groups, case.n, case.k, experts=case.groups)
    chosen, weights = weight_only_tiling(problem), case.groups * case.n * case.k
    tried: dict[WeightOnly, None] = dict.fromkeys([*([chosen] if chosen else []), *tilings(problem)])
    return Bench(
        op="block_matmul",
        name=case.name,
        inputs=functools.partial(inputs, case, tuple(tried)),
        ours={str(tiling): functools.partial(run, tiling, case.m) for tiling in tried},
        choices={str(tiling): Choice("weight_only", problem, tiling) for tiling in tried},
        chosen=str(chosen) if chosen else None,
        xla={"dequantised bf16": functools.partial(dequantised, case.groups)},
        reference=functools.partial(reference, case),
        nbytes=weights + 2 * case.m * case.groups * (case.k + case.n),
        flops=2 * case.m * weights,
        unit="bf16",
        shape={"m": case.m, "n": case.n, "k": case.k, "groups": case.groups},
    )


def tilings(problem: Problem) -> Iterator[WeightOnly]:
    """The tiles that are said to be fastest; the first also in other orders and, with many tokens, in longer stages."""

    def fits(tiling: WeightOnly) -> bool:
        return weight_only_reason(tiling, problem) is None

    first, *others = weight_only_tilings(problem, fits)[:TRIED]
    more = [dataclasses.replace(first, width=width) for width in (8, 32)] if first.tokens > 64 else []
    more.append(dataclasses.replace(first, depth=192 - first.depth, stages=max(2, first.stages * first.depth // 128)))
    yield from (first, *others, *filter(fits, more))


def padded(m: int, tiling: WeightOnly) -> int:
    return -(-m // tiling.tokens) * tiling.tokens


def inputs(case: WeightOnlyCase, tried: tuple[WeightOnly, ...], key: jax.Array) -> Operands:
    of_x, of_w = jax.random.split(key)
    values = jax.random.normal(of_x, (case.m, case.groups * case.k), jnp.bfloat16)
    return operands(values, weight(case, of_w), tried)


def weight(case: WeightOnlyCase, key: jax.Array) -> QuantTensor:
    return quantize(jax.random.normal(key, (case.groups * case.n, case.k)) * case.k**-0.5, FP8_BLOCK)


def operands(values: jax.Array, w: QuantTensor, tried: tuple[WeightOnly, ...]) -> Operands:
    """Of rows [m, groups x k], padded for the tilings that are tried."""
    m = len(values)
    sizes = {padded(m, tiling) for tiling in tried}
    return Operands({size: jnp.pad(values, ((0, size - m), (0, 0))) for size in sizes}, w)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(tiling: WeightOnly, m: int, sets: Operands) -> jax.Array:
    return weight_only_sm90.matmul(sets.x[padded(m, tiling)], sets.w.values, scale_bytes(sets.w.scale), tiling)


@functools.partial(jax.jit, static_argnums=0)
def dequantised(groups: int, sets: Operands) -> jax.Array:
    return _product(groups, sets.x[min(sets.x)], dequantize(sets.w, jnp.bfloat16)).astype(jnp.bfloat16)


def reference(case: WeightOnlyCase, sets: Operands) -> jax.Array:
    x = sets.x[min(sets.x)][: case.m].astype(jnp.float32)
    return _product(case.groups, x, dequantize(sets.w), precision="highest")


def _product(groups: int, x: jax.Array, w: jax.Array, precision: str | None = None) -> jax.Array:
    x, w = x.reshape(x.shape[0], groups, -1), w.reshape(groups, -1, w.shape[-1])
    how = {"precision": precision, "preferred_element_type": x.dtype}
    return jnp.einsum("mgk,gnk->mgn", x, w, **how).reshape(x.shape[0], -1)

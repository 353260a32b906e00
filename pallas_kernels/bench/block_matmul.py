"""Benchmarks of the dense FP8 matmul: operands quantised beforehand, as the peer takes them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.bench.case import Bench, Choice
from pallas_kernels.block_matmul import decode_sm90, kernel_sm90
from pallas_kernels.block_matmul.cases import BENCH, MatmulCase
from pallas_kernels.block_matmul.problem import SHARED_BYTES, Problem
from pallas_kernels.block_matmul.tiling import FewRows, ManyRows
from pallas_kernels.block_matmul.tilings import (
    dense_tiling,
    few_rows_reason,
    many_rows_reason,
    padded_rows,
)
from pallas_kernels.mosaic.launch import H100_SMS
from pallas_kernels.mosaic.scales import scale_bytes
from pallas_kernels.quant import FP8_BLOCK, FP8_GROUP, QuantTensor, dequantize, quantize

FEW = 64  # rows up to which the kernel for few rows is tried
MANY = 17  # and from which the other one is
ROWS_OF_SMALL = 128  # up to which small tiles of it are


class Operands(NamedTuple):
    """x [m, k] with zeros behind it up to every number of rows that a tiling asks for, by that number; w [n, k].

    tokens_last: the scales of the least padded x, transposed.
    """

    x: dict[int, QuantTensor]
    tokens_last: jax.Array
    w: QuantTensor

    @property
    def rows(self) -> QuantTensor:
        """x, padded least."""
        return self.x[min(self.x)]


def benches() -> Iterator[Bench]:
    return map(bench, BENCH)


def bench(case: MatmulCase) -> Bench:
    problem = Problem(case.m, case.n, case.k)
    chosen = dense_tiling(case.m, case.n, case.k)
    tried = dict.fromkeys([*([chosen] if chosen else []), *tilings(problem)])
    kinds = {FewRows: "few_rows", ManyRows: "many_rows"}
    return Bench(
        op="block_matmul",
        name=case.name,
        inputs=functools.partial(inputs, case),
        ours={str(tiling): functools.partial(run, tiling, case.m) for tiling in tried},
        choices={str(tiling): Choice(kinds[type(tiling)], problem, tiling) for tiling in tried},
        chosen=str(chosen) if chosen else None,
        xla={"dequantised bf16": dequantised, "plain fp8 dot": plain_dot},
        reference=functools.partial(reference, case.m),
        nbytes=case.m * case.k + case.n * case.k + 2 * case.m * case.n,
        flops=2 * case.m * case.n * case.k,
        peer=("gemm", case.m, case.n, case.k),
        shape={"m": case.m, "n": case.n, "k": case.k},
    )


def inputs(case: MatmulCase, key: jax.Array) -> Operands:
    of_x, of_w = jax.random.split(key)
    return operands(jax.random.normal(of_x, (case.m, case.k)), weight(case, of_w))


def weight(case: MatmulCase, key: jax.Array) -> QuantTensor:
    return quantize(jax.random.normal(key, (case.n, case.k)) * case.k**-0.5, FP8_BLOCK)


def operands(values: jax.Array, w: QuantTensor) -> Operands:
    """Of rows [m, k] that are yet to be rounded."""
    m = values.shape[0]
    sizes = {padded_rows(m, tiling) for tiling in (FewRows(), *(ManyRows(tile_m=tile_m) for tile_m in (64, 128, 256)))}
    x = {size: quantize(jnp.pad(values, ((0, size - m), (0, 0))), FP8_GROUP) for size in sizes}
    return Operands(x, scale_bytes(x[min(sizes)].scale).T, w)


def tilings(problem: Problem) -> Iterator[FewRows | ManyRows]:
    """Every way to cut this problem that is worth a try."""
    if problem.m <= FEW:
        yield from few_rows_tilings(problem)
    if problem.m >= MANY:
        yield from many_rows_tilings(problem)


def few_rows_tilings(problem: Problem) -> Iterator[FewRows]:
    """With as many bytes in flight as shared memory holds, in stages and warpgroups of every size."""
    rows = problem.rows or padded_rows(problem.m, FewRows())
    for warpgroups, blocks, shares in itertools.product((1, 2, 4), (1, 2, 4, 8), (1, 2, 4, 8)):
        if shares > 1 and problem.n // (64 * warpgroups) * shares > H100_SMS:
            continue  # there are tiles enough
        stage = blocks * 128 * (64 * warpgroups * problem.weights + rows)
        behind = 64 * warpgroups * rows * (2 + (4 * shares * problem.weights if shares > 1 else 0))
        stages = min(16, (SHARED_BYTES - behind) // stage)
        tiling = FewRows(blocks, stages, warpgroups, 160 if warpgroups < 4 else 104, shares)
        if stages >= 2 and few_rows_reason(tiling, problem) is None:
            yield tiling


# Two consumers of large tiles: the larger, the less shared memory and the L2 cache have to deliver.
LARGE = (
    *(
        dataclasses.replace(tile, in_turn=in_turn, cluster=cluster, cluster_along=along)
        for tile in (
            ManyRows(128, 256, 4, "columns"),
            ManyRows(256, 128, 4, "rows"),
            ManyRows(128, 128, 4, "rows"),
        )
        for in_turn, cluster, along in (
            (True, 1, "rows"),
            (False, 1, "rows"),
            (True, 2, "rows"),
            (False, 2, "rows"),
            (True, 2, "columns"),
        )
    ),
    *(ManyRows(128, 256, 4, "columns", width=width, cluster=2) for width in (1, 2)),
    *(
        ManyRows(128, 128, 6, "rows", blocks=blocks, in_flight=blocks, cluster=cluster, in_turn=in_turn)
        for cluster, in_turn, blocks in ((1, False, 2), (2, False, 1), (2, True, 1), (2, False, 2), (2, True, 2))
    ),
)
# Where there are few tiles: small ones, for more multiprocessors, several products in flight.
SMALL = (
    *(
        dataclasses.replace(tile, blocks=blocks, in_flight=blocks, cluster=cluster, cluster_along="columns")
        for tile in (ManyRows(128, 64, 8, "rows"), ManyRows(64, 128, 8, "columns"))
        for blocks, cluster in ((2, 1), (4, 1), (2, 2), (4, 2))
    ),
    ManyRows(128, 32, 10, "rows", blocks=2, in_flight=2, cluster=2, cluster_along="columns"),
    ManyRows(64, 64, 12, "columns", blocks=2, in_flight=2, cluster=2, cluster_along="columns"),
    *(ManyRows(64, 64, 12, "columns", blocks=n, in_flight=n, cluster=2, cluster_along="rows") for n in (2, 4)),
    ManyRows(128, 128, 6, "rows", blocks=2, in_flight=2),
    ManyRows(64, 256, 4, "columns", blocks=2, in_flight=2),
    ManyRows(128, 128, 4, "rows", shares=2),
    *(
        dataclasses.replace(tile, blocks=2, in_flight=2, shares=shares)
        for tile in (ManyRows(128, 64, 6, "rows"), ManyRows(64, 128, 6, "columns"))
        for shares in (2, 4)
    ),
)


def many_rows_tilings(problem: Problem) -> Iterator[ManyRows]:
    rows = problem.rows or problem.m
    tried = LARGE if rows > ROWS_OF_SMALL or (problem.rows and rows > 64) else SMALL
    yield from (tiling for tiling in tried if many_rows_reason(tiling, problem) is None)


def reference(m: int, sets: Operands) -> jax.Array:
    return jnp.matmul(dequantize(sets.rows), dequantize(sets.w).T, precision="highest")[:m]


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(tiling: ManyRows | FewRows, m: int, sets: Operands) -> jax.Array:
    scale = scale_bytes(sets.w.scale)
    if isinstance(tiling, FewRows):
        return decode_sm90.matmul(sets.rows.values, sets.tokens_last, sets.w.values, scale, tiling)
    x = sets.x[padded_rows(m, tiling)]
    return kernel_sm90.matmul(x.values, scale_bytes(x.scale), sets.w.values, scale, tiling)


@jax.jit
def dequantised(sets: Operands) -> jax.Array:
    x, w = dequantize(sets.rows, jnp.bfloat16), dequantize(sets.w, jnp.bfloat16)
    return jnp.einsum("mk,nk->mn", x, w, preferred_element_type=jnp.bfloat16)


@jax.jit
def plain_dot(sets: Operands) -> jax.Array:
    """The codes alone, without their scales: what the tensor cores do when nobody scales."""
    contract_last = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(sets.rows.values, sets.w.values, contract_last, preferred_element_type=jnp.bfloat16)

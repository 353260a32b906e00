"""Benchmarks of the dense FP8 matmul: operands quantised beforehand, as the peer takes them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench.case import Bench
from pallas_kernels.block_matmul import decode_sm90, kernel_sm90
from pallas_kernels.block_matmul.cases import BENCH, MatmulCase
from pallas_kernels.block_matmul.tiling import FewRows, ManyRows
from pallas_kernels.mosaic.scales import scale_bytes
from pallas_kernels.quant import FP8_BLOCK, FP8_GROUP, QuantTensor, dequantize, quantize

FEW = 64  # rows up to which the decode kernel is tried


def benches() -> Iterator[Bench]:
    return map(bench, BENCH)


def bench(case: MatmulCase) -> Bench:
    padded = -(-case.m // (8 if case.m <= FEW else 128)) * (8 if case.m <= FEW else 128)
    return Bench(
        op="block_matmul",
        name=case.name,
        inputs=functools.partial(inputs, case, padded),
        ours={str(tiling): functools.partial(run, tiling) for tiling in tilings(case, padded)},
        xla={"dequantised bf16": dequantised, "plain fp8 dot": plain_dot},
        reference=lambda sets: (dequantize(sets[0]) @ dequantize(sets[1]).T)[: case.m],
        nbytes=case.m * case.k + case.n * case.k + 2 * case.m * case.n,
        flops=2 * case.m * case.n * case.k,
        peer=("gemm", case.m, case.n, case.k),
        shape={"m": case.m, "n": case.n, "k": case.k},
    )


def inputs(case: MatmulCase, padded: int, key: jax.Array) -> tuple[QuantTensor, QuantTensor, jax.Array]:
    """x [padded, k] with zeros behind m, w [n, k], and the scales of x with tokens last."""
    of_x, of_w = jax.random.split(key)
    x = jnp.pad(jax.random.normal(of_x, (case.m, case.k)), ((0, padded - case.m), (0, 0)))
    x = quantize(x, FP8_GROUP)
    w = quantize(jax.random.normal(of_w, (case.n, case.k)) * case.k**-0.5, FP8_BLOCK)
    return x, w, scale_bytes(x.scale).T


def tilings(case: MatmulCase, padded: int) -> Iterator[ManyRows | FewRows]:
    """Every way to cut this problem that is worth a try."""
    if case.m <= FEW:
        for warpgroups in (1, 2):
            for blocks, stages in ((1, 16), (2, 8), (4, 4), (4, 6), (8, 3)):
                stage = blocks * 128 * (64 * warpgroups + padded)
                if case.k % (blocks * 128) == 0 and case.n % (64 * warpgroups) == 0 and stage * stages <= 210_000:
                    yield FewRows(blocks, stages, warpgroups)
    if case.m > 16:
        for shape in (
            ManyRows(128, 256, 4, "columns"),
            ManyRows(128, 128, 6, "rows"),
            ManyRows(128, 128, 4, "rows"),
            ManyRows(64, 256, 5, "columns"),
        ):
            if padded % shape.tile_m == 0 and case.n % shape.tile_n == 0:
                for rows_first, width in itertools.product((True, False), (1, 8, 16)):
                    yield dataclasses.replace(shape, rows_first=rows_first, width=width)


@functools.partial(jax.jit, static_argnums=0)
def run(tiling: ManyRows | FewRows, sets: tuple[Any, ...]) -> jax.Array:
    x, w, tokens_last = sets
    if isinstance(tiling, FewRows):
        return decode_sm90.matmul(x.values, tokens_last, w.values, scale_bytes(w.scale), tiling)
    return kernel_sm90.matmul(x.values, scale_bytes(x.scale), w.values, scale_bytes(w.scale), tiling)


@jax.jit
def dequantised(sets: tuple[Any, ...]) -> jax.Array:
    x, w = dequantize(sets[0], jnp.bfloat16), dequantize(sets[1], jnp.bfloat16)
    return jnp.einsum("mk,nk->mn", x, w, preferred_element_type=jnp.bfloat16)


@jax.jit
def plain_dot(sets: tuple[Any, ...]) -> jax.Array:
    """The codes alone, without their scales: what the tensor cores do when nobody scales."""
    contract_last = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(sets[0].values, sets[1].values, contract_last, preferred_element_type=jnp.bfloat16)

"""Benchmark of products whose scales are one a row or one in all: FP8 by our kernel, INT8 by XLA's dot.

INT8 products of XLA ask for XLA_FLAGS=--xla_gpu_enable_triton_gemm=false, see `products`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.bench.case import Bench, disagreement
from pallas_kernels.block_matmul import scaled_dot, sm90
from pallas_kernels.formats import parse_format
from pallas_kernels.quant import QuantTensor, dequantize, quantize

Inputs = tuple[QuantTensor, QuantTensor]


class OneScaleCase(NamedTuple):
    """x [m, k] in the format `x` times w [n, k] in the format `w`."""

    m: int
    n: int
    k: int
    x: str
    w: str


FORMATS = (  # of x, one scale a token, and of w: one a channel, one in all
    ("e4m3:row:float32", "e4m3:row:float32"),
    ("e4m3:row:float32", "e4m3:tensor:float32"),
    ("e5m2:row:float32", "e4m3:row:float32"),
    ("int8:row:float32", "int8:row:float32"),
)
BENCH = tuple(OneScaleCase(m, 4096, 4096, *formats) for formats in FORMATS for m in (1, 128, 4096))


def benches() -> Iterator[Bench]:
    return map(bench, BENCH)


def bench(case: OneScaleCase) -> Bench:
    m, n, k = case.m, case.n, case.k
    int8 = case.w.startswith("int8")
    return Bench(
        op="one_scale",
        name=f"m={m} {k} -> {n}, {case.x} x {case.w}",
        inputs=functools.partial(inputs, case),
        ours={"scaled_dot": by_xla} if int8 else {"sm90": by_kernel},
        xla={"dequantised bf16": dequantised},
        reference=exact,
        # Tensor cores add FP8 products of all of K in some 14 bits; dequantised, all are rounded to bfloat16.
        judge=functools.partial(disagreement, elementwise=2.0**-6),
        nbytes=n * k + m * k + 2 * m * n,
        flops=2 * m * n * k,
        unit="int8" if int8 else "fp8",
        shape={"m": m, "n": n, "k": k},
    )


def inputs(case: OneScaleCase, key: jax.Array) -> Inputs:
    of_x, of_w = jax.random.split(key)
    of_rows, of_weights = parse_format(case.x), parse_format(case.w)
    assert of_rows is not None and of_weights is not None, f"{case.x} x {case.w}"
    x, w = jax.random.normal(of_x, (case.m, case.k)), jax.random.normal(of_w, (case.n, case.k))
    return quantize(x, of_rows), quantize(w, of_weights)


@jax.jit
def by_kernel(sets: Inputs) -> jax.Array:
    return sm90.product(*sets, jnp.bfloat16)


@jax.jit
def by_xla(sets: Inputs) -> jax.Array:
    return scaled_dot.product(*sets).astype(jnp.bfloat16)


@jax.jit
def dequantised(sets: Inputs) -> jax.Array:
    x, w = (dequantize(side).astype(jnp.bfloat16) for side in sets)
    return x @ w.T


@jax.jit
def exact(sets: Inputs) -> jax.Array:
    x, w = (dequantize(side) for side in sets)
    return jnp.matmul(x, w.T, precision="highest")

"""Benchmarks of hyper-connections: `pre` beside XLA's reference and the peer's GEMM, which is a part of it; `post`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench.case import Bench, disagreement
from pallas_kernels.formats import FP8_GROUP, QuantFormat
from pallas_kernels.hyper_connection import kernel_sm90, post_sm90, reference
from pallas_kernels.hyper_connection.cases import BENCH, HyperCase
from pallas_kernels.hyper_connection.reference import Mix
from pallas_kernels.hyper_connection.tiling import CHUNK, GROUP, MIXED, STREAMS, PreTiling, default_tiling
from pallas_kernels.mosaic.launch import sm_count

HOW: dict[str, Any] = {"iterations": 20, "eps": 1e-6, "norm_eps": 1e-6}
COEFFICIENTS = 1e-5  # allowed of the coefficients, relative and elementwise: they are float32 throughout
Result = tuple[jax.Array, Mix]


def benches() -> Iterator[Bench]:
    for case in BENCH:
        yield bench_pre(case)
        yield bench_pre(case, FP8_GROUP)
        yield bench_post(case)


def bench_pre(case: HyperCase, form: QuantFormat | None = None) -> Bench:
    """form: of x's codes, which are made with it; the tests look at them."""
    codes = 0 if form is None else case.m * (case.width + case.width // CHUNK)
    return Bench(
        op="hyper_connection",
        name=f"pre{'' if form is None else ' and codes'} {case.name}",
        inputs=functools.partial(inputs, case),
        shared=functools.partial(parameters, case),
        ours={str(tiling): functools.partial(run_pre, tiling, form) for tiling in tilings(case)},
        xla={"reference": functools.partial(plain_pre, form)},
        reference=exact_pre,
        judge=difference,
        part=lambda result: result[:2],
        nbytes=case.m * (2 * (STREAMS + 1) * case.width + 4 * (MIXED - STREAMS))
        + 4 * MIXED * STREAMS * case.width
        + codes,
        flops=2 * case.m * MIXED * STREAMS * case.width,
        unit="bf16",
        peer=("hc", case.m, STREAMS * case.width),
        shape={"m": case.m, "d": case.width},
    )


def bench_post(case: HyperCase) -> Bench:
    return Bench(
        op="hyper_connection",
        name=f"post {case.name}",
        inputs=functools.partial(post_inputs, case),
        ours={"sm90": run_post},
        xla={"reference": plain_post},
        reference=exact_post,
        nbytes=case.m * (2 * (2 * STREAMS + 1) * case.width + 4 * (MIXED - STREAMS)),
        flops=0,
        shape={"m": case.m, "d": case.width},
    )


def tilings(case: HyperCase) -> Iterator[PreTiling]:
    """The default first, then what else is worth a try."""
    usual = default_tiling(case.m, case.width, sm_count())
    tried = [
        PreTiling(GROUP, stages=4, held=2),
        PreTiling(GROUP, stages=3, teller=True),
        *(PreTiling(GROUP, stages=2, lag=lag, held=2, teller=True) for lag in (3, 5, 4)),
    ]
    return iter(dict.fromkeys([usual, *tried]))


def inputs(case: HyperCase, key: jax.Array) -> jax.Array:
    return jax.random.normal(key, (case.m, STREAMS, case.width), jnp.bfloat16)


def parameters(case: HyperCase, key: jax.Array) -> tuple[jax.Array, ...]:
    """fn, base, scale and the norm's weight."""
    of_fn, of_base, of_norm = jax.random.split(key, 3)
    columns = STREAMS * case.width
    return (
        jax.random.normal(of_fn, (MIXED, columns)) * columns**-0.5,
        jax.random.normal(of_base, (MIXED,)),
        jnp.array([0.5, 1.0, 1.5]),
        1 + jax.random.normal(of_norm, (case.width,)) / 4,
    )


def post_inputs(case: HyperCase, key: jax.Array) -> tuple[jax.Array, jax.Array, Mix]:
    of_streams, of_out, of_mix = jax.random.split(key, 3)
    mix = jax.random.uniform(of_mix, (case.m, STREAMS, STREAMS + 1))
    out = jax.random.normal(of_out, (case.m, case.width), jnp.bfloat16)
    return inputs(case, of_streams), out, Mix(mix[..., 0], mix[..., 1:])


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_pre(tiling: PreTiling, form: QuantFormat | None, sets: tuple[jax.Array, tuple[jax.Array, ...]]) -> Any:
    streams, (fn, base, scale, norm_weight) = sets
    return kernel_sm90.pre(streams, fn, base, scale, norm_weight, **HOW, form=form, tiling=tiling)


@functools.partial(jax.jit, static_argnums=0)
def plain_pre(form: QuantFormat | None, sets: tuple[jax.Array, tuple[jax.Array, ...]]) -> Any:
    streams, (fn, base, scale, norm_weight) = sets
    return reference.pre(streams, fn, base, scale, norm_weight, **HOW, form=form)


@jax.jit
def exact_pre(sets: tuple[jax.Array, tuple[jax.Array, ...]]) -> Result:
    """x in float32: rounded, it may be one step of bfloat16 from another rounding of nearly the same number."""
    streams, (fn, base, scale, norm_weight) = sets
    return reference.pre(streams.astype(jnp.float32), fn, base, scale, norm_weight, **HOW)


@jax.jit
def run_post(sets: tuple[jax.Array, jax.Array, Mix]) -> jax.Array:
    return post_sm90.post(*sets)


@jax.jit
def plain_post(sets: tuple[jax.Array, jax.Array, Mix]) -> jax.Array:
    return reference.post(*sets)


@jax.jit
def exact_post(sets: tuple[jax.Array, jax.Array, Mix]) -> jax.Array:
    """In float32, as `exact_pre`."""
    streams, out, mix = sets
    return reference.post(streams.astype(jnp.float32), out, mix)


def difference(got: Result, want: Result) -> str | None:
    """What is wrong with x or a coefficient, None if nothing is."""
    for name, ours, theirs in zip(("post", "comb"), got[1], want[1], strict=True):
        if reason := disagreement(ours, theirs, COEFFICIENTS, COEFFICIENTS):
            return f"{name}: {reason}"
    return disagreement(got[0], want[0])

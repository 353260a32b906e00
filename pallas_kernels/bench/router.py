"""Benchmarks of routing: scores, choice, weights, counts and row order. XLA's side is the reference."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench.case import Bench, disagreement
from pallas_kernels.router import reference, sm90
from pallas_kernels.router.cases import BENCH, RouterCase
from pallas_kernels.router.reference import Routing

SCALE = 1.5
ROUNDING = 1e-5  # of scores and weights, which are float32 throughout
MAY_DIFFER = 0.01  # of the experts: two whose scores differ by rounding
Inputs = tuple[jax.Array, jax.Array, jax.Array]


def benches() -> Iterator[Bench]:
    return map(bench, BENCH)


def bench(case: RouterCase) -> Bench:
    return Bench(
        op="router",
        name=case.name,
        inputs=functools.partial(inputs, case),
        ours={"sm90": functools.partial(run, case.k)},
        xla={"reference": functools.partial(plain, case.k)},
        reference=functools.partial(plain, case.k),
        judge=difference,
        nbytes=case.experts * (4 * case.width + 4 * case.m + 8) + case.m * (2 * case.width + 12 * case.k),
        flops=2 * case.m * case.experts * case.width,
        unit="bf16",
        shape={"m": case.m, "experts": case.experts, "d": case.width, "k": case.k},
    )


def inputs(case: RouterCase, key: jax.Array) -> Inputs:
    """x, the matrix and the bias."""
    of_x, of_weight, of_bias = jax.random.split(key, 3)
    return (
        jax.random.normal(of_x, (case.m, case.width), jnp.bfloat16),
        jax.random.normal(of_weight, (case.experts, case.width)) * case.width**-0.5,
        jax.random.normal(of_bias, (case.experts,)) / 10,
    )


@functools.partial(jax.jit, static_argnums=0)
def run(k: int, sets: Inputs) -> Routing:
    return sm90.router(*sets, None, k=k, scoring="sqrtsoftplus", normalize=True, scale=SCALE)


@functools.partial(jax.jit, static_argnums=0)
def plain(k: int, sets: Inputs) -> Routing:
    return reference.router(*sets, None, k=k, scoring="sqrtsoftplus", normalize=True, scale=SCALE)


def difference(got: Routing, want: Routing) -> str | None:
    """What is wrong with a routing: its scores, or what does not follow from its own scores and choice."""
    if reason := disagreement(got.scores, want.scores, ROUNDING, ROUNDING):
        return f"scores: {reason}"
    ours, theirs = np.asarray(got.experts), np.asarray(want.experts)
    if (differ := np.mean(ours != theirs)) > MAY_DIFFER:
        return f"{differ:.1%} of the experts differ"
    same = (ours == theirs).all(axis=1)
    weights = np.where(same[:, None], np.asarray(got.weights), np.asarray(want.weights))
    if reason := disagreement(weights, want.weights, ROUNDING, ROUNDING):
        return f"weights: {reason}"
    flat = ours.reshape(-1)
    if not np.array_equal(got.counts, np.bincount(flat, minlength=len(got.counts))):
        return "counts are not those of the experts"
    return None if np.array_equal(got.order, np.argsort(flat, kind="stable")) else "rows are out of order"

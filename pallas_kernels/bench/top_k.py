"""Benchmarks of selection: normal scores, all of them shown. XLA's side is the reference, jitted."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench.case import Bench
from pallas_kernels.top_k import reference, sm90
from pallas_kernels.top_k.cases import BENCH, TopKCase

Inputs = tuple[jax.Array, jax.Array]


def benches() -> Iterator[Bench]:
    return map(bench, BENCH)


def bench(case: TopKCase) -> Bench:
    return Bench(
        op="top_k",
        name=case.name,
        inputs=functools.partial(inputs, case),
        ours={"sm90": functools.partial(run, case.k)},
        xla={"reference": functools.partial(plain, case.k)},
        reference=functools.partial(plain, case.k),
        judge=difference,
        nbytes=4 * case.rows * (case.entries + case.k + 1),
        flops=0,
        shape={"rows": case.rows, "entries": case.entries, "k": case.k},
    )


def inputs(case: TopKCase, key: jax.Array) -> Inputs:
    """Scores [rows, entries] and counts [rows]."""
    scores = jax.random.normal(key, (case.rows, case.entries))
    return scores, jnp.full((case.rows,), case.entries, jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def run(k: int, sets: Inputs) -> jax.Array:
    scores, counts = sets
    return sm90.top_k(scores, k, counts)


@functools.partial(jax.jit, static_argnums=0)
def plain(k: int, sets: Inputs) -> jax.Array:
    scores, counts = sets
    return reference.top_k(scores, k, counts)


def difference(got: jax.Array, want: jax.Array) -> str | None:
    """How many of the chosen are others, or at other places; None if none are."""
    differ = int(np.sum(np.asarray(got) != np.asarray(want)))
    return f"{differ} of {want.size} entries differ" if differ else None

"""Benchmarks of sparse prefill attention: a chunk of a long prompt, entries in the interchange format.

XLA's side is the reference, in blocks of queries where logits are many.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench.case import Bench
from pallas_kernels.bench.sparse_attention import difference
from pallas_kernels.quant import as_cached, encode_rows
from pallas_kernels.row_format import entry_format
from pallas_kernels.sparse_attention import prefill_blocks, prefill_sm90, reference
from pallas_kernels.sparse_attention.prefill_cases import BENCH, PrefillCase

FORM = entry_format("fp8", 64)
CHECKED = 64  # queries that are compared with the reference in float32
Inputs = tuple[Any, ...]
Result = tuple[jax.Array, jax.Array]


def benches() -> Iterator[Bench]:
    return map(bench, BENCH)


def bench(case: PrefillCase) -> Bench:
    seen = case.window + (case.top or case.entries)
    return Bench(
        op="sparse_attention_prefill",
        name=case.name,
        inputs=functools.partial(inputs, case),
        ours={"sm90": jax.jit(functools.partial(run, case, prefill_sm90.attend))},
        xla={"reference": jax.jit(functools.partial(run, case, prefill_blocks.sparse_attention_prefill))},
        reference=jax.jit(functools.partial(exact, case)),
        part=lambda result: tuple(x[0, checked(case)] for x in result),
        judge=difference,
        nbytes=case.tokens * (case.heads * case.width * 4 + 2 * case.width + 4 * case.top)
        + case.entries * FORM.nbytes(case.width),
        flops=4 * case.tokens * case.heads * case.width * seen,
        unit="bf16",
        shape={"tokens": case.tokens, "heads": case.heads, "entries": case.entries, "top": case.top},
    )


def inputs(case: PrefillCase, key: jax.Array) -> Inputs:
    """The op's arguments; the queries are the last that all entries allow."""
    of_q, of_band, of_entries, of_index, of_sink = jax.random.split(key, 5)
    q = jax.random.normal(of_q, (1, case.tokens, case.heads, case.width), jnp.bfloat16)
    band = jax.random.normal(of_band, (1, case.tokens + case.window - 1, case.width), jnp.bfloat16)
    first = max(case.entries * case.ratio - case.tokens, case.window)
    start, sink = jnp.full(1, first, jnp.int32), jax.random.normal(of_sink, (case.heads,))
    compressed = index = count = None
    if case.entries:
        compressed = encode_rows(jax.random.normal(of_entries, (1, case.entries, case.width)), FORM)
        count = (first + jnp.arange(case.tokens, dtype=jnp.int32)[None] + 1) // case.ratio
    if case.top and count is not None:
        index = distinct(of_index, count, case.top)
        count = jnp.minimum(count, case.top)
    return q, as_cached(band, FORM), start, compressed, index, count, sink


def distinct(key: jax.Array, count: jax.Array, top: int) -> jax.Array:
    """int32 [B, T, top] of the first `count` [B, T] entries: one at random of each of `top` equal shares of them."""
    each = jnp.maximum(count // top, 1)[..., None]
    within = jax.random.randint(key, (*count.shape, top), 0, each, jnp.int32)
    return jnp.arange(top, dtype=jnp.int32)[None, None] * each + within


def checked(case: PrefillCase) -> np.ndarray:
    return np.linspace(0, case.tokens - 1, CHECKED).astype(np.int32)


def run(case: PrefillCase, attend: Callable[..., Result], args: Inputs) -> Result:
    return attend(*args, width=case.window, scale=case.width**-0.5)


def exact(case: PrefillCase, args: Inputs) -> Result:
    """Some queries' results in float32, by the decode form."""
    q, band, start, compressed, index, count, sink = args
    rows = prefill_sm90.window_rows(start, case.tokens, band.shape[1], case.window)
    index, count = (x if x is None else x[:, checked(case)] for x in (index, count))
    q, band, rows = q[:, checked(case)].astype(jnp.float32), band.astype(jnp.float32), rows[:, checked(case)]
    out, lse = reference.sparse_attention(q, band, rows, compressed, index, count, sink, scale=case.width**-0.5)
    return out[0], lse[0]

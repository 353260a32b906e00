"""Benchmarks of compression into a cache: a decode step's, where a block closes and where none does, and a chunk's.

Caches and open blocks are donated and put back, as a step of decoding does it. XLA's side is the reference, jitted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench.case import Bench
from pallas_kernels.compress import initial_state, kernel_sm90, reference
from pallas_kernels.compress.cases import BENCH, CompressCase
from pallas_kernels.quant import empty_rows
from pallas_kernels.row_format import RowFormat, entry_format, index_format

EPS = 1e-6
MAY_DIFFER = 1e-3  # of codes, scales and tails: sums in another order move what lies on a boundary
ENTRIES = 16  # a sequence's cache has before the new ones
Inputs = list[Any]  # rows and state, which are replaced, and the other arguments


def benches() -> Iterator[Bench]:
    return map(bench, BENCH)


def bench(case: CompressCase) -> Bench:
    return Bench(
        op="compress",
        name=case.name,
        inputs=functools.partial(inputs, case),
        ours={"sm90": functools.partial(donated, case, kernel_sm90.compress_into)},
        xla={"reference": functools.partial(donated, case, reference.compress_into)},
        reference=functools.partial(plain, case),
        judge=difference,
        nbytes=nbytes(case),
        flops=0,
        shape={"b": case.batch, "t": case.tokens, "m": case.ratio, "w": case.halves * case.width},
    )


def form(case: CompressCase) -> RowFormat:
    return entry_format("fp8", case.rope) if case.kind == "entry" else index_format("fp8")


def nbytes(case: CompressCase) -> int:
    """New rows in, and into the rings where they stay; rows of the entries that close; the entries, and ape."""
    row, ratio = 8 * case.halves * case.width, case.ratio
    closed = 0 if not case.closes else max(1, case.tokens // ratio)
    kept = min(case.tokens, case.halves * ratio + 3)
    before = max(case.halves * ratio - case.tokens, 0) * 8 * case.width if case.closes else 0
    each = (case.tokens + kept) * row + before + closed * form(case).nbytes(case.width)
    return case.batch * each + ratio * row // 2


def inputs(case: CompressCase, key: jax.Array) -> Inputs:
    """Rows, state, and kv, gate, start, count, ape, the norm's weight."""
    keys = iter(jax.random.split(key, 6))
    width = case.halves * case.width
    state = initial_state(case.batch, case.ratio, width, case.halves == 2)
    state = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), state)
    kv, gate = (jax.random.normal(next(keys), (case.batch, case.tokens, width)) for _ in range(2))
    blocks = -(-case.tokens // case.ratio)
    start = (ENTRIES + blocks) * case.ratio - case.tokens - (0 if case.closes else 1)
    rows = empty_rows(form(case), (case.batch, ENTRIES + blocks, case.width))
    ape = jax.random.normal(next(keys), (case.ratio, width))
    weight = 1 + jax.random.normal(next(keys), (case.width,)) / 4
    whole = functools.partial(jnp.full, (case.batch,), dtype=jnp.int32)
    return [rows, state, kv, gate, whole(start), whole(case.tokens), ape, weight]


def donated(case: CompressCase, compress_into: Callable[..., Any], sets: Inputs) -> Inputs:
    """The input set itself, with rows and state replaced: again and again, they come out the same."""
    sets[0], sets[1] = in_place(case, compress_into, *sets)
    return sets


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def in_place(case: CompressCase, compress_into: Callable[..., Any], *sets: Any) -> tuple[Any, Any]:
    return _call(case, compress_into, *sets)


@functools.partial(jax.jit, static_argnums=0)
def plain(case: CompressCase, sets: Inputs) -> Inputs:
    return [*_call(case, reference.compress_into, *sets), *sets[2:]]


def _call(case: CompressCase, compress_into: Callable[..., Any], rows: Any, state: Any, *rest: Any) -> tuple[Any, Any]:
    kv, gate, *others = rest
    pair = np.arange(case.rope // 2, dtype=np.float32)
    frequencies = jnp.asarray(1e-4 ** (pair / pair.size))  # a constant, as in a model
    return compress_into(rows, kv, gate, state, *others, frequencies, norm_eps=EPS)


def difference(got: Inputs, want: Inputs) -> str | None:
    """Why rows or state are not those of the reference, MAY_DIFFER of the rows' bytes aside; None if they are."""
    for ours, theirs in zip(got[1], want[1], strict=True):
        if not np.array_equal(ours, theirs):
            return "the open blocks differ"
    for name in ("body", "tail", "scale"):
        ours, theirs = (getattr(sets[0], name) for sets in (got, want))
        if ours is not None and (differ := np.mean(np.asarray(ours) != np.asarray(theirs))) > MAY_DIFFER:
            return f"{differ:.2e} of the {name} differ ({MAY_DIFFER:.0e} allowed)"
    return None

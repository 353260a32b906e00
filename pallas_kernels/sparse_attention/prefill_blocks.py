"""The prefill form, a block of queries after the other: the memory of its logits does not grow with the sequence.

Forward and backward hold what one block of BLOCK queries needs, and nothing of size [T, S]: its rows of the band, and
either the entries that its queries name, gathered, or the logits of all entries, whichever costs less. The backward
pass computes each block again. Gradients to the band, to entries and to the sink are sums over blocks, in float32;
those to gathered entries are added in an order that a GPU does not fix.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.quant import Rows
from pallas_kernels.sparse_attention import reference

BLOCK = reference.BLOCK
MOST = 2**24  # logits of a call that are computed at once, as the definition says: 64 MB


class Shape(NamedTuple):
    """What is known of a call without its values."""

    width: int
    scale: float
    gathered: bool


class Operands(NamedTuple):
    """What has gradients: q [B, T, H, K], the band [B, S, K] and entries [B, C, K] in its dtype, the sink [H]."""

    q: jax.Array
    band: jax.Array
    entries: jax.Array | None
    sink: jax.Array | None


class Names(NamedTuple):
    """What queries see: the position of the first [B], indices [B, T, k] and counts [B, T] of entries."""

    start: jax.Array
    indices: jax.Array | None
    counts: jax.Array | None


def sparse_attention_prefill(
    q: jax.Array,
    band: jax.Array,
    start: jax.Array,
    compressed: jax.Array | Rows | None,
    compressed_index: jax.Array | None,
    compressed_count: jax.Array | None,
    sink: jax.Array | None,
    *,
    width: int,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Values and gradients of the definition, which it is where there are few logits."""
    batch, tokens, heads, head_dim = q.shape
    size = 0 if compressed is None else compressed.shape[1]
    if batch * tokens * heads * (min(width + BLOCK, band.shape[1]) + size) <= MOST or tokens <= BLOCK:
        named = (compressed, compressed_index, compressed_count)
        return reference.sparse_attention_prefill(q, band, start, *named, sink, width=width, scale=scale)
    # Of gathered entries and their logits, and of logits of all, which take several passes: numbers for each query.
    gathered = compressed_index is not None and compressed_index.shape[-1] * (head_dim + heads) < 2 * size * heads
    entries = None if compressed is None else reference.plain(compressed, q.dtype)
    operands = Operands(q, band.astype(q.dtype), entries, sink)
    return _attend(Shape(width, scale, gathered), operands, Names(start, compressed_index, compressed_count))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(shape: Shape, operands: Operands, names: Names) -> tuple[jax.Array, jax.Array]:
    def step(block: jax.Array, results: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        cut = Cut(shape, operands, names, block)
        found = _attend_block(shape, cut.operands, cut.rows_seen, cut.seen)
        return jax.tree.map(lambda all_of_them, x: _put(all_of_them, x, cut.begin), results, found)

    q = operands.q
    results = jnp.zeros_like(q), jnp.zeros(q.shape[:3], jnp.float32)
    return jax.lax.fori_loop(0, _blocks(q), step, results)


def _forward(shape: Shape, operands: Operands, names: Names) -> tuple[Any, Any]:
    return _attend(shape, operands, names), (operands, names)


def _backward(shape: Shape, saved: tuple[Operands, Names], cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
    operands, names = saved

    def step(block: jax.Array, sums: Operands) -> Operands:
        cut = Cut(shape, operands, names, block)

        def of_block(x: jax.Array) -> jax.Array:
            """The cotangent; 0 for the queries that the block before had, too."""
            x = _take(x, cut.begin, BLOCK)
            return jnp.where(cut.is_first.reshape(-1, *(1,) * (x.ndim - 2)), x, 0)

        _, pull = jax.vjp(lambda x: _attend_block(shape, x, cut.rows_seen, cut.seen), cut.operands)
        (of,) = pull(jax.tree.map(of_block, cotangents))
        of = jax.tree.map(lambda x: x.astype(jnp.float32), of)._replace(q=of.q)  # a query has one term
        entries = None
        if of.entries is not None and sums.entries is not None:
            entries = cut.scattered(sums.entries, of.entries) if shape.gathered else sums.entries + of.entries
        return Operands(
            q=_add(sums.q, of.q, cut.begin),
            band=_add(sums.band, of.band, cut.rows_begin),
            entries=entries,
            sink=None if of.sink is None else sums.sink + of.sink,
        )

    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), operands)._replace(q=jnp.zeros_like(operands.q))
    sums = jax.lax.fori_loop(0, _blocks(operands.q), step, sums)
    return jax.tree.map(lambda x, of: x.astype(of.dtype), sums, operands), None


_attend.defvjp(_forward, _backward)


class Cut:
    """What a block of queries reads: the last one begins earlier where queries are no multiple of BLOCK."""

    def __init__(self, shape: Shape, operands: Operands, names: Names, block: jax.Array):
        q, band, entries, sink = operands
        tokens, rows = q.shape[1], band.shape[1]
        history, span = rows - tokens, min(shape.width - 1 + BLOCK, rows)
        self.begin = jnp.minimum(block * BLOCK, tokens - BLOCK)
        self.rows_begin = jnp.clip(history + self.begin - (shape.width - 1), 0, rows - span)
        query = self.begin + jnp.arange(BLOCK)
        self.is_first = query >= block * BLOCK
        row = self.rows_begin + jnp.arange(span)
        distance = (history + query)[:, None] - row[None]
        held = names.start[:, None] - history + row[None] >= 0  # rows of positions below 0 are not read
        self.rows_seen = ((distance >= 0) & (distance < shape.width))[None] & held[:, None]
        self.seen = None
        if entries is not None:
            index, count = (x if x is None else _take(x, self.begin, BLOCK) for x in (names.indices, names.counts))
            if shape.gathered:
                assert index is not None, "what is gathered is named"
                self.seen = jnp.where(reference.within(index, count), index, -1)
                entries = reference.gather(entries, self.seen, q.dtype)
            else:
                self.seen = reference.selected(entries.shape[1], index, count)
        self.operands = Operands(_take(q, self.begin, BLOCK), _take(band, self.rows_begin, span), entries, sink)

    def scattered(self, sums: jax.Array, of: jax.Array) -> jax.Array:
        """sums [B, C, K] and of [B, BLOCK, k, K], each where its entry is."""
        assert self.seen is not None, "there are entries"
        batch = jnp.arange(sums.shape[0])[:, None, None]
        index = jnp.where(self.seen < 0, sums.shape[1], self.seen)
        return sums.at[batch, index].add(of, mode="drop")


def _attend_block(
    shape: Shape, operands: Operands, rows_seen: jax.Array, seen: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Queries over rows of the band, a mask, and entries: gathered ones and their names, or all and a mask."""
    parts = [reference.over_shared(operands.q, operands.band, rows_seen, shape.scale)]
    if operands.entries is not None and seen is not None:
        over = reference.over_picked if shape.gathered else reference.over_shared
        parts.append(over(operands.q, operands.entries, seen, shape.scale))
    return reference.combine(parts, operands.sink, operands.q)


def _blocks(q: jax.Array) -> int:
    return -(-q.shape[1] // BLOCK)


def _take(x: jax.Array, begin: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, begin, size, axis=1)


def _put(x: jax.Array, part: jax.Array, begin: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, begin, axis=1)


def _add(sums: jax.Array, part: jax.Array, begin: jax.Array) -> jax.Array:
    return _put(sums, _take(sums, begin, part.shape[1]) + part, begin)

"""The definition: explicit logits per query over its entries, float32 softmax, sink in the final combine."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.quant import Pages, Rows, decode_rows, take_paged, take_rows
from pallas_kernels.rotary import Rotation, turn

# Queries a block of the banded form: its logits are [BLOCK, width + BLOCK] instead of [T, T].
BLOCK = 128


def sparse_attention(
    q: jax.Array,
    window: jax.Array | Rows | Pages,
    window_index: jax.Array,
    compressed: jax.Array | Rows | Pages | None,
    compressed_index: jax.Array | None,
    compressed_count: jax.Array | None,
    sink: jax.Array | None,
    *,
    scale: float,
    rotation: Rotation | None = None,
) -> tuple[jax.Array, jax.Array]:
    parts = [over_named(q, window, window_index, scale)]
    if compressed is not None:
        if compressed_index is not None:
            seen = within(compressed_index, compressed_count)
            parts.append(over_named(q, compressed, jnp.where(seen, compressed_index, -1), scale))
        else:
            compressed = _in_order(compressed, q.shape[0])
            seen = _first(compressed.shape[1], compressed_count)
            parts.append(over_shared(q, plain(compressed, q.dtype), seen, scale))
    return combine(parts, sink, q, rotation)


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
    batch, tokens, heads, head_dim = q.shape
    history = band.shape[1] - tokens
    block = max(tokens, 1) if band.shape[1] <= width + BLOCK else BLOCK  # short or full attention: one dense block
    blocks = -(-tokens // block)
    before = min(width - 1, band.shape[1] - 1) if blocks > 1 else history
    # Pad so that every block of queries has `before` rows in front of it and the last one is full.
    padding = ((0, 0), (max(before - history, 0), blocks * block - tokens), (0, 0))
    rows = jnp.pad(band[:, max(history - before, 0) :], padding).astype(q.dtype)
    index = jnp.arange(blocks)[:, None] * block + jnp.arange(before + block)[None]
    rows = rows[:, index]  # [B, blocks, before + block, K]
    queries = _to_blocks(q, blocks, block)
    distance = before + jnp.arange(block)[:, None] - jnp.arange(before + block)[None]  # query minus row
    position = start[:, None, None] + index[None] - before  # [B, blocks, rows]
    held = position >= jnp.maximum(start - history, 0)[:, None, None]
    seen = ((distance >= 0) & (distance < width))[None, None] & held[:, :, None]
    rows = _blank_unseen(rows, seen)
    products = jnp.einsum("bcqhk,bcnk->bcqhn", queries, rows, preferred_element_type=jnp.float32)
    parts = [(_masked(products, scale, seen), rows)]
    if compressed is not None:
        seen = selected(compressed.shape[1], compressed_index, compressed_count)
        entries = _blank_unseen(plain(compressed, q.dtype), seen)
        products = jnp.einsum("bcqhk,bnk->bcqhn", queries, entries, preferred_element_type=jnp.float32)
        parts.append((_masked(products, scale, _to_blocks(seen, blocks, block)), entries))
    out, lse = combine(parts, sink, queries)
    return _from_blocks(out, tokens), _from_blocks(lse, tokens)


def over_named(
    q: jax.Array, entries: jax.Array | Rows | Pages, index: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Logits [B, T, H, n] of q [B, T, H, K] over entries [B, N, K] at index [B, T, n], and those entries."""
    return over_picked(q, gather(entries, index, q.dtype), index, scale)


def over_picked(q: jax.Array, picked: jax.Array, index: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """The same for entries [B, T, n, K] that were gathered."""
    products = jnp.einsum("bthk,btnk->bthn", q, picked, preferred_element_type=jnp.float32)
    return _masked(products, scale, index >= 0), picked


def over_shared(q: jax.Array, entries: jax.Array, seen: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """Logits of q [B, T, H, K] over those of entries [B, N, K] that it has seen [B, T, N], and the entries."""
    entries = _blank_unseen(entries, seen)
    products = jnp.einsum("bthk,bnk->bthn", q, entries, preferred_element_type=jnp.float32)
    return _masked(products, scale, seen), entries


def combine(
    parts: Sequence[tuple[jax.Array, jax.Array]],
    sink: jax.Array | None,
    q: jax.Array,
    rotation: Rotation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax over all parts, logits and values; values have one axis less where queries share their entries."""
    logits, values = zip(*parts, strict=True)
    tops = [jnp.max(x, axis=-1, initial=-jnp.inf) for x in logits]  # a part may be empty
    top = functools.reduce(jnp.maximum, tops)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))[..., None]
    weights = [jnp.exp(x - top) for x in logits]
    total = sum(jnp.sum(w, axis=-1) for w in weights)
    out = sum(_weighted(w, v, q) for w, v in zip(weights, values, strict=True))
    some = total != 0  # a NaN stays one: it must not pass for "no entry"
    safe = jnp.where(some, total, 1.0)
    lse = jnp.where(some, jnp.log(safe) + top[..., 0], -jnp.inf)
    share = 1 / safe
    if sink is not None:
        # exp(lse) / (exp(lse) + exp(sink)), the part of the softmax that the entries keep.
        finite = jnp.where(some, lse, 0.0) - jnp.expand_dims(sink.astype(jnp.float32), range(lse.ndim - 1))
        share = share * jax.nn.sigmoid(finite)
    out = out * jnp.where(some, share, 0.0)[..., None]
    if rotation is not None:
        out = turn(out, rotation.shared(-2))
    return out.astype(q.dtype), lse


def _weighted(weights: jax.Array, values: jax.Array, q: jax.Array) -> jax.Array:
    spec = {
        (4, 4): "bthn,btnk->bthk",  # decode, gathered
        (4, 3): "bthn,bnk->bthk",  # decode, shared
        (5, 4): "bcqhn,bcnk->bcqhk",  # prefill, band
        (5, 3): "bcqhn,bnk->bcqhk",  # prefill, compressed
    }[weights.ndim, values.ndim]
    return jnp.einsum(spec, weights.astype(q.dtype), values, preferred_element_type=jnp.float32)


def _masked(products: jax.Array, scale: float, seen: jax.Array) -> jax.Array:
    return jnp.where(jnp.expand_dims(seen, -2), products * scale, -jnp.inf)


def _blank_unseen(entries: jax.Array, seen: jax.Array) -> jax.Array:
    """Zeroes entries [..., n, K] that no query of seen [..., queries, n] reads: 0 times a stray NaN would be NaN."""
    return jnp.where(jnp.any(seen, axis=-2)[..., None], entries, 0)


def gather(entries: jax.Array | Rows | Pages, index: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """entries [B, N, K] at index [B, T, n] -> [B, T, n, K]; 0, never a stray NaN, where the index is -1."""
    batch, tokens, count = index.shape
    flat = jnp.maximum(index, 0).reshape(batch, tokens * count)
    match entries:
        case Rows():
            picked = decode_rows(take_rows(entries, flat), dtype)
        case Pages():
            picked = decode_rows(take_paged(entries, flat), dtype)
        case _:
            picked = jnp.take_along_axis(entries, flat[..., None], axis=1).astype(dtype)
    return jnp.where((index >= 0)[..., None], picked.reshape(batch, tokens, count, picked.shape[-1]), 0)


def _in_order(entries: jax.Array | Rows | Pages, batch: int) -> jax.Array | Rows:
    """The entries [B, C, K] of every sequence in the order of their numbers."""
    if not isinstance(entries, Pages):
        return entries
    return take_paged(entries, jnp.broadcast_to(jnp.arange(entries.rows, dtype=jnp.int32), (batch, entries.rows)))


def plain(entries: jax.Array | Rows, dtype: jnp.dtype) -> jax.Array:
    return decode_rows(entries, dtype) if isinstance(entries, Rows) else entries.astype(dtype)


def within(index: jax.Array, count: jax.Array | None) -> jax.Array:
    seen = index >= 0
    return seen if count is None else seen & _first(index.shape[-1], count)


def _first(size: int, count: jax.Array | None) -> jax.Array:
    assert count is not None, "without an index, the number of visible entries is needed"
    return jnp.arange(size)[None, None] < count[..., None]


def selected(size: int, index: jax.Array | None, count: jax.Array | None) -> jax.Array:
    """The selection as a mask [B, T, size]."""
    if index is None:
        return _first(size, count)
    batch, tokens, _ = index.shape
    target = jnp.where(within(index, count), index, size)
    rows = jnp.arange(batch * tokens)[:, None]
    mask = (
        jnp.zeros((batch * tokens, size), bool)
        .at[rows, target.reshape(batch * tokens, index.shape[2])]
        .set(True, mode="drop")
    )
    return mask.reshape(batch, tokens, size)


def _to_blocks(x: jax.Array, blocks: int, block: int) -> jax.Array:
    pad = [(0, 0), (0, blocks * block - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, pad).reshape(x.shape[0], blocks, block, *x.shape[2:])


def _from_blocks(x: jax.Array, tokens: int) -> jax.Array:
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])[:, :tokens]

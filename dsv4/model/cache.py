"""What decoding remembers, as explicit pytrees: a window ring, compressed entries, open compressor blocks.

Nothing about a sequence is inferred from values: `length` says how many tokens each row has seen, and with it which
slots mean something. Rows are independent; a slot that was never written holds 0.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4.config import Execution, LayerConfig, ModelConfig
from pallas_kernels.compress import CompressorState, Entries, initial_state

# Tokens one decode step may carry a sequence (a token and its drafts): the ring has room for that many more, so that
# rejected drafts never overwrite a slot that is still inside the window.
MAX_STEP = 4


class CompressedCache(NamedTuple):
    """entries [B, capacity // m, K] and the blocks that are still open."""

    entries: jax.Array
    state: CompressorState


class LayerCache(NamedTuple):
    """window [B, slots, K]: the token at position p is in slot p % slots. The others are None where a layer has none."""

    window: jax.Array
    compressed: CompressedCache | None
    index: CompressedCache | None


@functools.partial(jax.tree_util.register_dataclass, data_fields=("length", "layers"), meta_fields=("capacity",))
@dataclasses.dataclass(frozen=True)
class Cache:
    """The state of B sequences: `length` int32 [B] tokens seen so far, at most `capacity` each."""

    length: jax.Array
    layers: tuple[LayerCache, ...]
    capacity: int


def init_cache(config: ModelConfig, execution: Execution, batch: int, capacity: int) -> Cache:
    """An empty cache for `batch` sequences of up to `capacity` tokens."""
    layers = tuple(_layer(config, layer, execution, batch, capacity) for layer in config.layers)
    return Cache(jnp.zeros(batch, jnp.int32), layers, capacity)


def _layer(config: ModelConfig, layer: LayerConfig, execution: Execution, batch: int, capacity: int) -> LayerCache:
    dtype = jnp.dtype(execution.cache_dtype or execution.dtype)
    head_dim = config.attention.head_dim
    slots = capacity if layer.kind == "full" else config.attention.window + MAX_STEP - 1

    def compressed(width: int) -> CompressedCache:
        overlap = layer.kind == "csa"
        state = initial_state(batch, layer.ratio, width * (2 if overlap else 1), overlap)
        return CompressedCache(jnp.zeros((batch, capacity // layer.ratio, width), dtype), state)

    return LayerCache(
        jnp.zeros((batch, slots, head_dim), dtype),
        compressed(head_dim) if layer.compressed else None,
        compressed(config.indexer.head_dim) if layer.kind == "csa" else None,
    )


def write_window(window: jax.Array, kv: jax.Array, start: jax.Array, count: jax.Array) -> jax.Array:
    """Puts the first `count` rows of kv [B, T, K] at positions start.. into the ring; older rows of the same slot go."""
    slots, tokens = window.shape[1], kv.shape[1]
    token = jnp.arange(tokens)[None]
    last = (token < count[:, None]) & (token >= count[:, None] - slots)
    slot = jnp.where(last, (start[:, None] + token) % slots, slots)
    return _scatter(window, slot, kv)


def read_band(window: jax.Array, start: jax.Array, rows: int) -> jax.Array:
    """The `rows` tokens before `start` in order of position [B, rows, K]; positions below 0 give any row."""
    slot = (start[:, None] - rows + jnp.arange(rows)[None]) % window.shape[1]
    return jnp.take_along_axis(window, slot[..., None], axis=1)


def window_index(position: jax.Array, width: int, slots: int) -> jax.Array:
    """Slots of the last `width` tokens seen by queries at position [B, T], int32 [B, T, width]; -1 before token 0."""
    seen = position[..., None] - (width - 1) + jnp.arange(width)[None, None]
    return jnp.where(seen >= 0, seen % slots, -1)


def write_entries(cache: jax.Array, entries: Entries) -> jax.Array:
    """Puts finished entries at their numbers; unfinished ones are dropped."""
    number = jnp.arange(entries.values.shape[1])[None]
    slot = jnp.where(number < entries.closed[:, None], entries.first[:, None] + number, cache.shape[1])
    return _scatter(cache, slot, entries.values)


def _scatter(cache: jax.Array, slot: jax.Array, rows: jax.Array) -> jax.Array:
    batch = jnp.arange(cache.shape[0])[:, None]
    return cache.at[batch, slot].set(rows.astype(cache.dtype), mode="drop")

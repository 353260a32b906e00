"""What decoding remembers, as explicit pytrees: a window ring, compressed entries, open compressor blocks.

Nothing about a sequence is inferred from values: `length` says how many tokens each row has seen, and with it which
slots mean something; rolling back to a shorter length, by less than MAX_STEP tokens, needs nothing else. Rows are
independent; a slot that was never written holds 0.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dsv4.config import Execution, LayerConfig, ModelConfig
from pallas_kernels.compress import CompressorState, initial_state
from pallas_kernels.quant import Rows, decode_rows, empty_rows, encode_rows
from pallas_kernels.ring import MAX_STEP, read_ring, write_ring
from pallas_kernels.row_format import RowFormat


class CompressedCache(NamedTuple):
    """entries: rows [B, capacity // m, K], and the blocks that are still open."""

    entries: Rows
    state: CompressorState


class LayerCache(NamedTuple):
    """window: rows [B, slots, K], a ring of keys (pallas_kernels.ring). The others are None where a layer has none."""

    window: Rows
    compressed: CompressedCache | None
    index_keys: CompressedCache | None


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


def rollback(cache: Cache, length: jax.Array) -> Cache:
    """`cache` as it was at `length` int32 [B] tokens a row, at most MAX_STEP - 1 fewer than it holds.

    Takes back rejected drafts: what they wrote lies behind `length` and is overwritten by the tokens to come.
    """
    return dataclasses.replace(cache, length=length)


def _layer(config: ModelConfig, layer: LayerConfig, execution: Execution, batch: int, capacity: int) -> LayerCache:
    stored, attention = execution.cache_format, config.attention
    head_dim = attention.head_dim
    slots = (capacity if layer.kind == "full" else attention.window) + MAX_STEP - 1

    def compressed(width: int, form: RowFormat) -> CompressedCache:
        overlap = layer.kind == "csa"
        state = initial_state(batch, layer.ratio, width * (2 if overlap else 1), overlap)
        return CompressedCache(empty_rows(form, (batch, capacity // layer.ratio, width)), state)

    return LayerCache(
        empty_rows(stored.window_format(attention), (batch, slots, head_dim)),
        compressed(head_dim, stored.entry_format(attention)) if layer.compressed else None,
        compressed(config.indexer.head_dim, stored.index_format()) if layer.kind == "csa" else None,
    )


def window_index(position: jax.Array, width: int, slots: int) -> jax.Array:
    """Slots of the last `width` tokens seen by queries at position [B, T], int32 [B, T, width]; -1 before token 0."""
    seen = position[..., None] - (width - 1) + jnp.arange(width)[None, None]
    return jnp.where(seen >= 0, seen % slots, -1)


def write_window(ring: Rows, kv: jax.Array, start: jax.Array, count: jax.Array) -> Rows:
    """Puts the first count[b] keys of kv [B, T, K] at positions start[b].. of the ring, in its format."""
    return jax.tree.map(lambda old, new: write_ring(old, new, start, count), ring, encode_rows(kv, ring.format))


def read_window(ring: Rows, first: jax.Array, count: int, dtype: DTypeLike) -> jax.Array:
    """The keys [B, count, K] of positions first[b] .., as `read_ring` has them."""
    return decode_rows(jax.tree.map(lambda leaf: read_ring(leaf, first, count), ring), dtype)

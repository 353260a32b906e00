"""The definition of compression: a block's rows averaged per channel, by the softmax of their gates, in float32.

A gate has the learned `ape` of its position in the block added. Where blocks overlap (CSA), an entry pools the first
half of the channels of the block before with the second half of its own. Then RMSNorm, then RoPE at the position of
the block's first token.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.norm import rms_norm
from pallas_kernels.quant.rows import Rows, encode_rows
from pallas_kernels.ring import MAX_STEP, put_rows, read_ring, write_ring
from pallas_kernels.rotary import rotate


class CompressorState(NamedTuple):
    """Raw projections of the block being filled (and, for CSA, of the one before it): float32 rings [B, slots, w].

    Rings (pallas_kernels.ring) so that the drafts of a step can be rejected after one of them has closed a block.
    """

    kv: jax.Array
    gate: jax.Array


class Entries(NamedTuple):
    """What one call finished: values [B, nb, K]; entry i of row b has number first[b] + i, and i < closed[b] exist."""

    values: jax.Array
    first: jax.Array
    closed: jax.Array


def initial_state(batch: int, ratio: int, rows: int, overlap: bool) -> CompressorState:
    """The state before the first token; `rows` is the projection width w."""
    shape = (batch, ratio * (2 if overlap else 1) + MAX_STEP - 1, rows)
    return CompressorState(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))


def compress(
    kv: jax.Array,
    gate: jax.Array,
    state: CompressorState | None,
    start: jax.Array,
    count: jax.Array,
    ape: jax.Array,
    norm_weight: jax.Array,
    frequencies: jax.Array,
    *,
    norm_eps: float,
) -> tuple[Entries, CompressorState | None]:
    m, width = ape.shape[0], norm_weight.shape[0]
    history = ape.shape[1] // width - 1  # blocks kept before the open one: 1 when overlapping
    kv, gate = kv.astype(jnp.float32), gate.astype(jnp.float32)
    first = start // m
    closed = (start + count) // m - first
    if state is None:
        blocks, carried = kv.shape[1] // m, None
        kv_rows, gate_rows = (_pad_front(rows[:, : blocks * m], history * m) for rows in (kv, gate))
    else:
        blocks = (kv.shape[1] + m - 1) // m  # the most that can close: the open block may hold m - 1 rows already
        carried = CompressorState(write_ring(state.kv, kv, start, count), write_ring(state.gate, gate, start, count))
        from_block = (first - history) * m
        if kv.shape[1] <= MAX_STEP:
            # From the new rings, which still hold all of it: to read the old ones beside them XLA would copy them.
            kv_rows, gate_rows = (read_ring(ring, from_block, (history + blocks) * m) for ring in carried)
        else:
            kv_rows, gate_rows = (
                _append(read_ring(ring, from_block, (history + 1) * m), rows, start % m + history * m, blocks * m)
                for ring, rows in ((state.kv, kv), (state.gate, gate))
            )
    pooled = _pool(kv_rows, gate_rows, ape.astype(jnp.float32), blocks, width, first)
    entry = first[:, None] + jnp.arange(blocks)[None]
    values = rotate(rms_norm(pooled, norm_weight, norm_eps), entry * m, frequencies)
    return Entries(values, first, closed), carried


def compress_into(
    rows: Rows,
    kv: jax.Array,
    gate: jax.Array,
    state: CompressorState,
    start: jax.Array,
    count: jax.Array,
    ape: jax.Array,
    norm_weight: jax.Array,
    frequencies: jax.Array,
    *,
    norm_eps: float,
) -> tuple[Rows, CompressorState]:
    entries, after = compress(kv, gate, state, start, count, ape, norm_weight, frequencies, norm_eps=norm_eps)
    assert after is not None
    i = jnp.arange(entries.values.shape[1])[None]
    number = jnp.where(i < entries.closed[:, None], entries.first[:, None] + i, rows.shape[1] + i)
    new = encode_rows(entries.values, rows.format)
    return jax.tree.map(lambda leaf, values: put_rows(leaf, number, values), rows, new), after


def _pool(kv: jax.Array, gate: jax.Array, ape: jax.Array, blocks: int, width: int, first: jax.Array) -> jax.Array:
    """Entries of `blocks` consecutive blocks; rows begin one block earlier when overlapping."""
    m, overlap = ape.shape[0], ape.shape[1] // width == 2
    batch = kv.shape[0]

    def block(rows: jax.Array, offset: int) -> jax.Array:
        return rows[:, offset * m : (offset + blocks) * m].reshape(batch, blocks, m, rows.shape[-1])

    kv_now, gate_now = block(kv, int(overlap)), block(gate, int(overlap)) + ape[None, None]
    if overlap:
        kv_before, gate_before = block(kv, 0), block(gate, 0) + ape[None, None]
        exists = (first[:, None] + jnp.arange(blocks)[None] > 0)[:, :, None, None]
        kv_before = jnp.where(exists, kv_before, 0)
        gate_before = jnp.where(exists, gate_before, -jnp.inf)
        kv_now = jnp.concatenate([kv_before[..., :width], kv_now[..., width:]], axis=2)
        gate_now = jnp.concatenate([gate_before[..., :width], gate_now[..., width:]], axis=2)
    return jnp.sum(jax.nn.softmax(gate_now, axis=2) * kv_now, axis=2)


def _pad_front(rows: jax.Array, count: int) -> jax.Array:
    return jnp.pad(rows, ((0, 0), (count, 0), (0, 0)))


def _append(history: jax.Array, new: jax.Array, fill: jax.Array, beyond: int) -> jax.Array:
    """The first fill[b] rows of history, then those of `new` (its last row repeats); `beyond` more than history."""
    at = jnp.arange(history.shape[1] + beyond)[None]
    index = jnp.where(at < fill[:, None], at, history.shape[1] + jnp.minimum(at - fill[:, None], new.shape[1] - 1))
    return jnp.take_along_axis(jnp.concatenate([history, new], axis=1), index[..., None], axis=1)

"""Ring buffers over token positions: the row of position p lies in slot p % slots.

Window entries and open compressor blocks live in rings with room for MAX_STEP - 1 rows more than the model ever looks
back on. A step of up to MAX_STEP tokens therefore overwrites nothing that is still needed if its last tokens turn out
to be rejected drafts: rolling a sequence back is setting its length.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from pallas_kernels.typing import typed

MAX_STEP = 4  # tokens one decode step may carry a sequence: a token and its drafts


@typed
def write_ring(
    ring: Shaped[Array, "B slots w"], rows: Shaped[Array, "B T w"], start: Int[Array, " B"], count: Int[Array, " B"]
) -> Shaped[Array, "B slots w"]:
    """Puts the first `count` of `rows` at positions start.. in the ring's dtype; of more than fit, the last stay."""
    slots = ring.shape[1]
    if rows.shape[1] > slots:  # only the last are moved
        first = jnp.maximum(count - slots, 0)
        rows = jnp.take_along_axis(rows, (first[:, None] + jnp.arange(slots)[None])[..., None], axis=1)
        start, count = start + first, count - first
    token = jnp.arange(rows.shape[1])[None]
    slot = jnp.where(token < count[:, None], (start[:, None] + token) % slots, slots + token)
    return put_rows(ring, slot, rows.astype(ring.dtype))


@typed
def put_rows(
    pool: Shaped[Array, "B N w"], index: Int[Array, "B n"], rows: Shaped[Array, "B n w"]
) -> Shaped[Array, "B N w"]:
    """Row index[b, i] of each sequence becomes rows[b, i]; indices must differ, and those from N on are dropped.

    In place where the pool is donated or not used any more; on CPUs, where XLA has no arithmetic for FP8, it converts a
    whole FP8 pool and back.
    """
    sequence = jnp.arange(pool.shape[0])[:, None]
    return pool.at[sequence, index].set(rows, mode="drop", unique_indices=True)


@typed
def read_ring(ring: Shaped[Array, "B slots w"], first: Int[Array, " B"], count: int) -> Shaped[Array, "B n w"]:
    """The rows of positions first .. first + count - 1; what was never written or is overwritten comes as it lies."""
    slot = (first[:, None] + jnp.arange(count)[None]) % ring.shape[1]
    return jnp.take_along_axis(ring, slot[..., None], axis=1)

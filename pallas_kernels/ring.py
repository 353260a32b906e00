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
    slots, tokens = ring.shape[1], rows.shape[1]
    token = jnp.arange(tokens)[None]
    kept = (token < count[:, None]) & (token >= count[:, None] - slots)
    slot = jnp.where(kept, (start[:, None] + token) % slots, slots)
    return ring.at[jnp.arange(ring.shape[0])[:, None], slot].set(rows.astype(ring.dtype), mode="drop")


@typed
def read_ring(ring: Shaped[Array, "B slots w"], first: Int[Array, " B"], count: int) -> Shaped[Array, "B n w"]:
    """The rows of positions first .. first + count - 1; what was never written or is overwritten comes as it lies."""
    slot = (first[:, None] + jnp.arange(count)[None]) % ring.shape[1]
    return jnp.take_along_axis(ring, slot[..., None], axis=1)

"""What a kernel makes of gate and up before the second projection: clamped SwiGLU, times the routing weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def activate(gate: jax.Array, up: jax.Array, factor: jax.Array, *, limit: float, across: int) -> jax.Array:
    """Of float32 sums in registers. limit: 0 for none. across: the axis of tokens, with a factor each."""
    if limit:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    hidden = gate / (1 + jnp.exp(-gate)) * up
    return hidden * jax.lax.broadcast_in_dim(factor, hidden.shape, (across,))

"""The clamped SwiGLU of every expert."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.typing import typed


def require_limit(limit: float) -> None:
    """Raises ValueError for a clamp below zero, which would leave one value alone, or for NaN."""
    if not limit >= 0:
        raise ValueError(f"limit is {limit}: of the SwiGLU clamp, 0 for none or a positive number")


@typed
def swiglu(gate: Float[Array, "*rows I"], up: Float[Array, "*rows I"], limit: float) -> Float[Array, "*rows I"]:
    """silu(min(gate, limit)) * clip(up, -limit, limit), computed and returned in float32; limit 0 clamps nothing.

    Raises ValueError for another limit that is not positive.
    """
    require_limit(limit)
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    if limit:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return jax.nn.silu(gate) * up

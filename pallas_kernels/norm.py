"""RMSNorm: multiplied in float32, cast once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.typing import typed


@typed
def rms_norm(x: Float[Array, "*rows D"], weight: Float[Array, " D"] | None, eps: float) -> Float[Array, "*rows D"]:
    """x / rms(x) * weight in float32, in x's dtype. `weight=None` only divides (the query heads)."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if weight is not None:
        normed = normed * jnp.expand_dims(weight.astype(jnp.float32), range(x.ndim - 1))
    return normed.astype(x.dtype)

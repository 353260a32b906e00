"""Rotary position embedding on interleaved pairs (channels 2i and 2i+1) of the LAST dims of a vector."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.typing import typed


@typed
def rotate(
    x: Float[Array, "*rows K"],
    positions: Int[Array, "*rows"],
    frequencies: Float[Array, " half"],
    *,
    inverse: bool = False,
) -> Float[Array, "*rows K"]:
    """Rotates the last `2 * half` channels of x by `positions * frequencies` (radians), in float32, in x's dtype.

    `inverse` rotates back, as the attention output needs: its values were rotated keys.
    """
    half = frequencies.shape[0]
    angles = positions[..., None].astype(jnp.float32) * jnp.expand_dims(frequencies, range(positions.ndim))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if inverse:
        sin = -sin
    rest, rotary = jnp.split(x, [x.shape[-1] - 2 * half], axis=-1)
    pairs = rotary.astype(jnp.float32).reshape(*x.shape[:-1], half, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return jnp.concatenate([rest, turned.reshape(rotary.shape).astype(x.dtype)], axis=-1)

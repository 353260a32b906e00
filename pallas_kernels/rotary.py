"""Rotary position embedding on interleaved pairs (channels 2i and 2i+1) of the LAST dims of a vector."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.typing import typed


class Rotation(NamedTuple):
    """What turns channels 2i and 2i+1 of the last `2 * half`: float32 cosines and sines [*rows, half]."""

    cos: Float[Array, "*rows half"]
    sin: Float[Array, "*rows half"]

    @property
    def inverse(self) -> Rotation:
        return Rotation(self.cos, -self.sin)

    def shared(self, axis: int) -> Rotation:
        """With a new axis, all of whose rows are turned alike: the heads of a token."""
        return Rotation(jnp.expand_dims(self.cos, axis), jnp.expand_dims(self.sin, axis))


@typed
def rotation(positions: Int[Array, "*rows"], frequencies: Float[Array, " half"]) -> Rotation:
    """By `positions * frequencies` (radians)."""
    angles = positions[..., None].astype(jnp.float32) * jnp.expand_dims(frequencies, range(positions.ndim))
    return Rotation(jnp.cos(angles), jnp.sin(angles))


@typed
def turn(x: Float[Array, "*rows K"], by: Rotation) -> Float[Array, "*rows K"]:
    """x, its last `2 * half` channels turned in float32, in x's dtype; the rows of `by` are x's, or broadcast."""
    cos, sin = by
    half = cos.shape[-1]
    rest, rotary = jnp.split(x, [x.shape[-1] - 2 * half], axis=-1)
    pairs = rotary.astype(jnp.float32).reshape(*x.shape[:-1], half, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return jnp.concatenate([rest, turned.reshape(rotary.shape).astype(x.dtype)], axis=-1)


@typed
def rotate(
    x: Float[Array, "*rows K"], positions: Int[Array, "*rows"], frequencies: Float[Array, " half"]
) -> Float[Array, "*rows K"]:
    """Rotates the last `2 * half` channels of x by `positions * frequencies` (radians), in float32, in x's dtype."""
    return turn(x, rotation(positions, frequencies))

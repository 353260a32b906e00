"""UE8M0 scales inside kernels: bytes, because registers have no such type on Hopper."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def scale_bytes(scale: jax.Array) -> jax.Array:
    """float8_e8m0fnu as uint8, the same memory; other types as they are."""
    return lax.bitcast_convert_type(scale, jnp.uint8) if scale.dtype == jnp.float8_e8m0fnu else scale


def scale_product(vector: jax.Array, scalar: jax.Array) -> jax.Array:
    """float32 product of a vector of scales and one scale, both bytes or both float32.

    Bytes multiply by adding exponents. A product below 2^-126 becomes 0, as float32 units flush it, and one from
    2^128 on infinity; the NaN code 255 gives infinity or NaN too, never a number.
    """
    if vector.dtype == jnp.float32:
        return vector * scalar
    code = vector.astype(jnp.int32) + (scalar.astype(jnp.int32) - 127)
    code = jnp.clip(code, 0, 255)
    return lax.bitcast_convert_type(code << 23, jnp.float32)

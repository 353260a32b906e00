"""UE8M0 scales inside kernels: bytes, because registers have no such type on Hopper."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

NAN_CODE = 255  # of UE8M0
NAN_BITS = 0x7FC00000  # of float32: more than those of infinity, so that a maximum with them is NaN


def scale_bytes(scale: jax.Array) -> jax.Array:
    """float8_e8m0fnu as uint8, the same memory; other types as they are."""
    return lax.bitcast_convert_type(scale, jnp.uint8) if scale.dtype == jnp.float8_e8m0fnu else scale


def scale_product(vector: jax.Array, scalar: jax.Array) -> jax.Array:
    """float32 product of a vector of scales and one scale, both bytes or both float32.

    Bytes multiply by adding exponents. A product below 2^-126 becomes 0, as float32 units flush it, and one from
    2^128 on infinity. The scalar's NaN gives NaN: no infinity, of which a clamp makes a number. The vector's does not:
    its values are of activations, whose codes are NaN then.
    """
    if vector.dtype == jnp.float32:
        return vector * scalar
    scalar = scalar.astype(jnp.int32)
    least = jnp.where(scalar == NAN_CODE, NAN_BITS, 0)
    code = jnp.minimum(vector.astype(jnp.int32) + (scalar - 127), 255)
    return lax.bitcast_convert_type(jnp.maximum(code << 23, least), jnp.float32)

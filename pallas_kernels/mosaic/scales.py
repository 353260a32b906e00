"""UE8M0 scales inside kernels: bytes, because registers have no such type on Hopper, which become float32's bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic.interpreter import is_interpreted

NAN_CODE = 255  # of UE8M0
NAN_BITS = 0x7FC00000  # of float32: more than those of infinity, so that a maximum with them is NaN
LEAST_BITS = 1 << 22  # of 2^-127, which is subnormal: the only scale that is not its code << 23


def scale_bytes(scale: jax.Array) -> jax.Array:
    """float8_e8m0fnu as uint8, the same memory; other types as they are."""
    return lax.bitcast_convert_type(scale, jnp.uint8) if scale.dtype == jnp.float8_e8m0fnu else scale


def scale_bits(scale: jax.Array) -> jax.Array:
    """float32's bits, int32, of UE8M0 codes, uint8 or int32: NaN for the code 255. float32 scales as they are."""
    if scale.dtype == jnp.float32:
        return scale
    code = scale.astype(jnp.int32)
    nan = (code + 1) >> 8  # of the code 255 alone. A comparison takes registers that the MXFP4 kernel does not have.
    return jnp.maximum(code << 23, LEAST_BITS) + (nan << 22)


def activation_bits(scale: jax.Array) -> jax.Array:
    """The same of scales whose values are activations: those of the code 255 are NaN themselves, and no test is due."""
    return scale if scale.dtype == jnp.float32 else jnp.maximum(scale.astype(jnp.int32) << 23, LEAST_BITS)


def scale_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """float32 product of scales and other scales or one, each float32 or its bits. NaN gives NaN, too large infinity.

    One multiplication: of codes, exponents would have to be added, and kept within their limits.
    """
    b = jnp.broadcast_to(b, a.shape)  # before it is a float: Mosaic turns no bits of scalars into those
    if is_interpreted() and a.dtype == b.dtype == jnp.int32:
        # XLA flushes the subnormal 2^-127 on the CPU, which a GPU multiplies as any other: exponents are added instead.
        # (What is below 2^-126 itself becomes 0 here, and is subnormal on a GPU.)
        code, largest = jnp.clip((a >> 23) + (b >> 23) - 127, 0, 255), jnp.maximum(a, b)
        return lax.bitcast_convert_type(jnp.where(largest >= 255 << 23, largest, code << 23), jnp.float32)
    a, b = (x if x.dtype == jnp.float32 else lax.bitcast_convert_type(x, jnp.float32) for x in (a, b))
    return a * b

"""Exact arithmetic on float32 bits: devices flush subnormals, formats do not.

Multiplying by a power of two and rounding amax / largest up to one are done on integers, so that the scale 2^-127 and
inputs below 2^-126 keep their meaning on every device.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt8, UInt32

_SIGN = np.uint32(1 << 31)
_FRACTION = np.uint32((1 << 23) - 1)
_HIDDEN = np.uint32(1 << 23)
_NAN = np.uint32(0x7FC00000)
E8M0_NAN = 255


def bits_of(x: Float32[Array, ...]) -> UInt32[Array, ...]:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def magnitude_bits(x: Float32[Array, ...]) -> UInt32[Array, ...]:
    """Bits of |x|. They are ordered as the magnitudes are, NaN above infinity."""
    return bits_of(x) & ~_SIGN


def float_of(bits: UInt32[Array, ...]) -> Float32[Array, ...]:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def power_of_two(exponent: Int32[Array, ...]) -> Float32[Array, ...]:
    """2^exponent for exponents from -126 to 127; beyond them the nearer of the two."""
    return float_of((jnp.clip(exponent, -126, 127) + 127).astype(jnp.uint32) << 23)


def scale_code(amax: Float32[Array, ...], largest: float) -> UInt8[Array, ...]:
    """UE8M0 code c (2^(c - 127)) of amax * float32(1 / largest), one product, rounded UP; 255 if amax is not finite."""
    bits = bits_of(amax * np.float32(1 / largest))
    code = (bits >> 23) + ((bits & _FRACTION) != 0).astype(jnp.uint32)
    return jnp.where(jnp.isfinite(amax), code, E8M0_NAN).astype(jnp.uint8)


def divide_by_power_of_two(x: Float32[Array, ...], codes: Int32[Array, ...]) -> Float32[Array, ...]:
    """x / 2^(code - 127), for rounding to a code: exact from 2^-100 up, and below it nothing that rounds to a code.

    Subnormal x count with their value. NaN where x or the scale is.
    """
    bits = bits_of(x)
    field = ((bits >> 23) & 255).astype(jnp.int32)
    significand = (bits & _FRACTION) | jnp.where(field > 0, _HIDDEN, np.uint32(0))
    exponent = jnp.maximum(field, 1) - 150 + 127 - codes
    magnitude = significand.astype(jnp.int32).astype(jnp.float32) * power_of_two(exponent)
    signed = float_of(bits_of(magnitude) | (bits & _SIGN))
    return jnp.where((field == 255) | (codes == E8M0_NAN), jnp.nan, signed)


def times_power_of_two(values: UInt32[Array, ...], codes: Int32[Array, ...]) -> UInt32[Array, ...]:
    """Float32 bits of `value * 2^(code - 127)`; `values` are float32 bits of zero, NaN or a normal number.

    The elements have at most eight significant bits (int8) and no magnitude below 2^-16 (E5M2), so that a result
    below 2^-126 is shifted right by at most 17 places and, from E5M2 with its three bits, loses none of them.
    """
    sign, fraction = values & _SIGN, values & _FRACTION
    field = ((values >> 23) & 255).astype(jnp.int32)
    exponent = field + codes - 127
    normal = exponent.astype(jnp.uint32) << 23 | fraction
    subnormal = (fraction | _HIDDEN) >> jnp.clip(1 - exponent, 0, 31).astype(jnp.uint32)
    magnitude = jnp.where(exponent > 0, normal, subnormal)
    magnitude = jnp.where(exponent > 254, jnp.uint32(255 << 23), magnitude)
    magnitude = jnp.where(field == 0, jnp.uint32(0), magnitude)
    nan = (field == 255) | (codes == E8M0_NAN)
    return jnp.where(nan, _NAN, sign | magnitude)

"""Floats to codes and back, element by element: rounding, saturation, packing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Shaped, UInt8, UInt32

from pallas_kernels.formats import ELEMENTS, Element, ElementType
from pallas_kernels.quant.bits import bits_of, power_of_two


def encode(x: Float32[Array, "... n"], element: Element, key: jax.Array | None = None) -> Shaped[Array, "... stored"]:
    """Codes of x as they are stored: to nearest even, or stochastically with a `key`; beyond the largest, the largest.

    The sign of zero is kept, but for int8. NaN is NaN where the element has one; e2m1 and int8 give their largest
    (whoever scales marks the tile by its scale).
    """
    kind = ELEMENTS[element]
    clipped = jnp.clip(x, -kind.largest, kind.largest)  # jax's own cast to E4M3 makes NaN of what is too large
    if key is not None:
        clipped = _round_stochastically(clipped, kind, key)
    if element == "int8":
        return jnp.where(jnp.isnan(x), kind.largest, jnp.round(clipped)).astype(jnp.int8)
    if element == "e2m1":
        return pack_nibbles(_e2m1_codes(clipped))
    return clipped.astype(kind.dtype)


def decode(stored: Shaped[Array, "... stored"], element: Element) -> UInt32[Array, "... n"]:
    """Float32 bits of the stored codes: exact, and zero, NaN or a normal number.

    FP8 is decoded as the integers its codes are. Compiled for a GPU, XLA leaves out a cast to FP8 that a cast back
    follows (it allows itself excess precision), and with it the rounding that `round_trip` is there for.
    """
    if element == "e2m1":
        return _float32_bits_of_e2m1(unpack_nibbles(stored))
    if element == "e4m3":
        return _float32_bits_of_e4m3(jax.lax.bitcast_convert_type(stored, jnp.uint8))
    if element == "e5m2":
        half = jax.lax.bitcast_convert_type(stored, jnp.uint8).astype(jnp.uint16) << 8  # its upper byte is an E5M2
        return bits_of(jax.lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32))
    return bits_of(stored.astype(jnp.float32))


def pack_nibbles(codes: UInt8[Array, "... full"]) -> UInt8[Array, "... half"]:
    """Codes of columns 2i (LOW nibble) and 2i + 1 share byte i."""
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    return pairs[..., 0] | pairs[..., 1] << 4


def unpack_nibbles(packed: UInt8[Array, "... half"]) -> UInt8[Array, "... full"]:
    pairs = jnp.stack([packed & 15, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def _round_stochastically(x: Float32[Array, ...], kind: ElementType, key: jax.Array) -> Float32[Array, ...]:
    """One of the two neighbours on the element's grid, the nearer the likelier: unbiased. Grid points stay."""
    exponent = ((bits_of(x) >> 23) & 255).astype(jnp.int32) - 127
    step = power_of_two(
        jnp.zeros_like(exponent) if kind.uniform else jnp.maximum(exponent, kind.lowest) - kind.mantissa
    )
    cells = x / step  # exact: a power of two
    low = jnp.floor(cells)
    # 23 random bits, as many as a cell of a float32 has places: u < fraction has exactly its probability.
    up = jax.random.uniform(key, x.shape, jnp.float32) < cells - low
    return jnp.copysign(jnp.clip((low + up.astype(jnp.float32)) * step, -kind.largest, kind.largest), x)


def _e2m1_codes(x: Float32[Array, ...]) -> UInt8[Array, ...]:
    """Steps of 0.5 below 2, of 1 below 4, of 2 up to 6: codes 0..4, 4..6, 6..7, ties to even codes."""
    magnitude = jnp.where(jnp.isnan(x), 6.0, jnp.abs(x))
    code = jnp.where(
        magnitude < 2,
        jnp.round(magnitude * 2),
        jnp.where(magnitude < 4, jnp.round(magnitude) + 2, jnp.round(magnitude / 2) + 4),
    )
    return code.astype(jnp.uint8) | (bits_of(x) >> 31).astype(jnp.uint8) << 3


def _float32_bits_of_e2m1(codes: UInt8[Array, ...]) -> UInt32[Array, ...]:
    """Bits `s ee m`: magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6. Code 1 is the format's only subnormal."""
    codes = codes.astype(jnp.uint32)
    magnitude = codes & 7
    normal = ((magnitude >> 1) + 126) << 23 | (magnitude & 1) << 22
    small = jnp.where(magnitude == 1, jnp.uint32(126 << 23), jnp.uint32(0))
    return (codes >> 3) << 31 | jnp.where(magnitude < 2, small, normal)


def _float32_bits_of_e4m3(codes: UInt8[Array, ...]) -> UInt32[Array, ...]:
    """Bits `s eeee mmm`, bias 7: magnitudes below 8 are subnormal, steps of 2^-9; 127 is NaN."""
    codes = codes.astype(jnp.uint32)
    magnitude = codes & 127
    normal = (magnitude << 20) + ((127 - 7) << 23)
    small = bits_of(magnitude.astype(jnp.float32) * np.float32(2.0**-9))
    finite = jnp.where(magnitude < 8, small, normal)
    return (codes >> 7) << 31 | jnp.where(magnitude == 127, jnp.uint32(0x7FC00000), finite)

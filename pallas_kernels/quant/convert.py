"""Arrays to QuantTensor and back: the definition, in plain jnp, exact on every device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Shaped

from pallas_kernels.formats import QuantFormat
from pallas_kernels.quant import elements
from pallas_kernels.quant.bits import (
    E8M0_NAN,
    bits_of,
    divide_by_power_of_two,
    float_of,
    magnitude_bits,
    scale_code,
    times_power_of_two,
)
from pallas_kernels.quant.tensor import QuantTensor
from pallas_kernels.typing import typed

# Scales from here on leave quantisation far from subnormal numbers: 1 / scale and every product that rounds to a code
# other than zero are normal.
NORMAL = 2.0**-100


@typed
def quantize(
    x: Float[Array, "... rows columns"],
    form: QuantFormat,
    *,
    scale: Shaped[Array, ...] | None = None,
    key: jax.Array | None = None,
) -> QuantTensor:
    """The codes and scales of `x` in `form`, bit for bit the recorded vectors where tests/oracle has any.

    scale: used instead of the tiles' own (a static, calibrated one), of the format's scale type and broadcastable to
    `form.scale_shape(x.shape)`; what it cannot reach saturates. key: for stochastic rounding.

    A tile with a value that is not finite becomes NaN as a whole (its scale is); under a given scale NaN stays where
    the element has one, and is its largest value where not. Raises FormatError for a shape the
    format cannot hold, ValueError for a key without stochastic rounding or the reverse, or a scale of another type.
    """
    shape = form.scale_shape(x.shape)
    if (key is None) != (form.rounding == "nearest"):
        raise ValueError(f"rounding is {form.rounding!r}, key {key}: stochastic rounding, and only it, takes a key")
    wide = x.astype(jnp.float32)
    own = scale is None
    if scale is None:
        scale = _scales(wide, form)
    elif np.dtype(scale.dtype) != form.scale_dtype:
        raise ValueError(f"scale is {scale.dtype}, {form.name} stores {form.scale_dtype}")
    scale = jnp.broadcast_to(scale, shape)
    spread = _spread(scale, form, x.shape)
    if form.power_of_two and own and form.amax_floor >= NORMAL * form.largest:
        # What has no place in a code is far above the subnormals: a product of floats is exact where it matters.
        ratio = wide * _spread(1 / as_float(scale), form, x.shape)
    elif form.scale == "ue8m0":
        ratio = divide_by_power_of_two(wide, jax.lax.bitcast_convert_type(spread, jnp.uint8).astype(jnp.int32))
    elif form.power_of_two and own:  # a scale that was given may be any number
        codes = jnp.where(jnp.isnan(spread), 255, (bits_of(spread.astype(jnp.float32)) >> 23).astype(jnp.int32))
        ratio = divide_by_power_of_two(wide, codes)
    else:
        ratio = wide / spread.astype(jnp.float32)
    return QuantTensor(elements.encode(ratio, form.element, key), scale, form)


@typed
def dequantize(x: QuantTensor, dtype: DTypeLike = jnp.float32) -> Float[Array, "... rows columns"]:
    """The array `x` stands for: `values * scale` in float32, then cast once to `dtype`.

    The product is exact for UE8M0 and other power-of-two scales: integer arithmetic on the codes, because devices flush
    subnormals (they may still flush in the cast to a narrower `dtype`). Products from 2^128 on are inf; scale code 255
    and NaN codes give NaN. Raises ValueError listing what `validate` finds.
    """
    x.require_valid()
    form = x.format
    values = elements.decode(x.values, form.element)
    spread = _spread(x.scale, form, x.shape)
    if form.scale == "ue8m0":
        codes = jax.lax.bitcast_convert_type(spread, jnp.uint8).astype(jnp.int32)
        return float_of(times_power_of_two(values, codes)).astype(dtype)
    return (float_of(values) * spread.astype(jnp.float32)).astype(dtype)


def scaled(x: QuantTensor, dtype: DTypeLike) -> Float[Array, "... rows columns"]:
    """What arithmetic multiplies: `dequantize` by one float product, which may flush results below 2^-126 to zero.

    Matrix units flush those anyway, and the exact integer arithmetic costs several times as much.
    """
    x.require_valid()
    values = float_of(elements.decode(x.values, x.format.element))
    return (values * _spread(as_float(x.scale), x.format, x.shape)).astype(dtype)


def as_float(scale: Shaped[Array, ...]) -> Float32[Array, ...]:
    """Scales of any type as float32; the UE8M0 code 0, 2^-127, may be flushed to zero."""
    if scale.dtype != jnp.float8_e8m0fnu:
        return scale.astype(jnp.float32)
    codes = jax.lax.bitcast_convert_type(scale, jnp.uint8)
    return jnp.where(codes == E8M0_NAN, jnp.nan, float_of(codes.astype(jnp.uint32) << 23))


@typed
def round_trip(x: Float[Array, "... rows columns"], form: QuantFormat) -> Float[Array, "... rows columns"]:
    """`x` as `form` would give it back, in x's dtype: what simulates a format on plain arrays."""
    return scaled(quantize(x, form), x.dtype)


def _scales(x: Float32[Array, "... rows columns"], form: QuantFormat) -> Shaped[Array, ...]:
    """One scale a tile, of the format's scale type; NaN where the tile is not finite throughout."""
    amax = jnp.maximum(_tile_amax(x, form), np.float32(form.amax_floor))  # NaN stays NaN
    amax = jnp.where(jnp.isfinite(amax), jnp.minimum(amax, np.float32(form.amax_ceiling)), jnp.nan)
    codes = scale_code(amax, form.largest)
    if form.scale == "ue8m0":
        return jax.lax.bitcast_convert_type(codes, form.scale_dtype)
    if form.power_of_two:
        exact = jnp.where(codes == 255, jnp.nan, float_of(codes.astype(jnp.uint32) << 23))
    else:
        exact = amax * np.float32(1 / form.largest)  # compiled, a division by a constant is this product anyway
    if form.scale == "bfloat16":
        # Up: rounded down, the largest value of the tile would saturate. One float32 step too many is the product's
        # rounding, and ignored, so that quantising a second time gives the same scale.
        exact = float_of((bits_of(exact) + np.uint32(0xFFFE)) & np.uint32(0xFFFF0000))
    return exact.astype(form.scale_dtype)


def _tile_amax(x: Float32[Array, "... rows columns"], form: QuantFormat) -> Float32[Array, "... tr tc"]:
    """Largest magnitude of every tile, NaN if one is; partial tiles at the edges are padded with zeros.

    Magnitudes are compared as the integers their bits are, where NaN is largest: XLA's reduction of floats on the CPU
    drops NaN from some shapes, and devices flush subnormals.
    """
    *leading, rows, columns = x.shape
    high = max(rows, 1) if form.tile[0] is None else form.tile[0]  # a tile of no rows has a scale, too
    wide = max(columns, 1) if form.tile[1] is None else form.tile[1]
    down, across = form.scale_shape(x.shape)[-2:]
    padding = [(0, 0)] * len(leading) + [(0, down * high - rows), (0, across * wide - columns)]
    tiles = jnp.pad(magnitude_bits(x), padding).reshape(*leading, down, high, across, wide)
    return float_of(jnp.max(tiles, axis=(-3, -1)))


def _spread(scale: Shaped[Array, "... tr tc"], form: QuantFormat, shape: tuple[int, ...]) -> Shaped[Array, "... r c"]:
    """One scale a tile -> one an element of `shape`, or one for all of an axis (1), which broadcasts."""
    for axis, side, size in zip((-2, -1), form.tile, shape[-2:], strict=True):
        if side is not None and side > 1:
            scale = jnp.repeat(scale, side, axis=axis)
            scale = jax.lax.slice_in_dim(scale, 0, size, axis=axis % scale.ndim)
    return scale

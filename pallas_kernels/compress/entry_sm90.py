"""What becomes of an entry in a warpgroup's registers: normed, rotated, encoded and stored as a row of a cache."""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.compress.tiling import TILE, Held
from pallas_kernels.formats import QuantFormat
from pallas_kernels.mosaic.lanes import exchanged, hadamard
from pallas_kernels.mosaic.launch import store_narrow
from pallas_kernels.quant.rows import Rows
from pallas_kernels.row_format import RowFormat

MAGNITUDE, INFINITY, NAN = 0x7FFFFFFF, 0x7F800000, 0x7FC00000  # bits of a float32: all but the sign, and two values
FRACTION_BITS, FRACTION = 23, 0x7FFFFF
NAN_CODE = 255  # of UE8M0


def registers(size: Held) -> Any:
    """How a warpgroup holds an entry: four neighbours a thread and two tiles a warp, or all of it in every warp."""
    groups, columns = size
    if groups == 1:
        return plgpu.Layout.TILED(plgpu.Tiling(((1, columns), (columns // 32,))), (plgpu.Replicated(4),), (-2,), -1)
    assert size == (8, TILE), f"an entry of {size}"
    return plgpu.Layout.TILED(plgpu.Tiling((size, (2, TILE), (4,))), (-5,), (-3, -2), -1)


def normed(wide: jax.Array, weight: jax.Array, eps: float, layout: Any) -> jax.Array:
    """RMSNorm of the one entry that [groups, columns] are."""
    squares = jnp.sum(wide * wide, axis=1)
    squares = _spread(squares, wide.shape, layout) if len(squares) == 1 else jnp.sum(squares)
    return wide * lax.rsqrt(squares / wide.size + eps) * weight


def rotated(x: jax.Array, position: jax.Array, frequency: jax.Array, layout: Any) -> jax.Array:
    """Pairs of channels rotated by position * frequency (radians, of every channel); those with frequency 0 stay."""
    angle = position.astype(jnp.float32) * frequency
    other = exchanged(x, 1, layout)
    column = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=layout)
    other = jnp.where((column & 1) == 0, -other, other)
    return jnp.where(frequency == 0, x, x * jnp.cos(angle) + other * jnp.sin(angle))


def views(rows: Rows, size: Held) -> tuple[Any, Any, Any]:
    """Body, tail and scales of rows [B, N, width] (None for none), [B, N, ..] as `write` stores them."""
    columns = min(size.columns, rows.body.shape[-1])
    return rows.body.reshape(*rows.body.shape[:2], -1, columns), rows.tail, rows.scale


def scratch(form: RowFormat, size: Held) -> dict[str, Any]:
    """Where the parts of an FP8 entry change hands."""
    if not form.tail or form.quant is None:
        return {}
    return {
        "codes_smem": plgpu.SMEM(tuple(size), form.quant.values_dtype),
        "tail_smem": plgpu.SMEM(tuple(size), jnp.bfloat16),
    }


def write(
    wide: jax.Array, form: RowFormat, at: Any, outs: Any, layout: Any, codes_smem: Any = None, tail_smem: Any = None
) -> None:
    """Row at = (sequence, number) of `views` becomes the entry float32 [groups, columns].

    Scale bytes that are only reserved stay as they are where the entry is one tile.
    """
    body, tail, scale = outs
    if form.quant is None:
        store_narrow(body, at, wide.astype(form.plain))
        return
    if form.hadamard:
        wide = hadamard(wide, layout)
    codes, scales = quantized(wide, form.quant, wide.size - form.tail, layout)
    if tail is None:
        store_narrow(body, at, codes)
        store_narrow(scale, at, scales)
        return
    codes_smem[...] = codes
    tail_smem[...] = wide.astype(jnp.bfloat16)
    (groups, columns), (tiles, kept), turned = wide.shape, body.shape[2:], tail.shape[2]
    lines = [(body, (*at, tile), codes_smem.at[tile, pl.ds(0, kept)]) for tile in range(tiles)]
    lines.append((tail, at, tail_smem.at[groups - 1, pl.ds(columns - turned, turned)]))
    for gmem, index, smem in lines:
        store_narrow(gmem, index, plgpu.load(smem, layout=_line(smem.shape[0]), optimized=False))
    store_narrow(scale, (*at, pl.ds(0, groups)), scales)


def quantized(wide: jax.Array, form: QuantFormat, channels: int, layout: Any) -> tuple[jax.Array, jax.Array]:
    """Codes [groups, columns] of the first `channels` channels, and stored scales [groups], 0 of groups without any.

    As `quant.quantize` has them: a group that is not finite becomes NaN as a whole.
    """

    def float_of(bits: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(bits, jnp.float32)

    group, column = (plgpu.broadcasted_iota(jnp.int32, wide.shape, axis, layout=layout) for axis in (0, 1))
    counts = group * wide.shape[1] + column < channels
    peak = jnp.max(jnp.where(counts, lax.bitcast_convert_type(wide, jnp.int32) & MAGNITUDE, 0), axis=1)
    finite = peak < INFINITY
    amax = float_of(jnp.clip(peak, _bits_of(form.amax_floor), _bits_of(form.amax_ceiling)))
    code = (lax.bitcast_convert_type(amax * np.float32(1 / form.largest), jnp.int32) + FRACTION) >> FRACTION_BITS
    ratio = wide * _spread(float_of(jnp.where(finite, (254 - code) << FRACTION_BITS, NAN)), wide.shape, layout)
    codes = jnp.clip(ratio, -form.largest, form.largest).astype(form.values_dtype)
    if form.scale == "float32":
        return codes, float_of(jnp.where(finite, code << FRACTION_BITS, NAN))
    stored = jnp.where(finite, code, NAN_CODE)
    if wide.shape[0] > 1:
        number = plgpu.broadcasted_iota(jnp.int32, stored.shape, 0, layout=layout.reduce(1))
        stored = jnp.where(number * wide.shape[1] < channels, stored, 0)
    return codes, stored.astype(jnp.uint8)


def _spread(vector: jax.Array, shape: tuple[int, ...], layout: Any) -> jax.Array:
    """[groups] to every column."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, [0]), layout)


def _line(columns: int) -> Any:
    """How every warp holds [columns], a multiple of 16: over as many lanes as divide them."""
    unit = math.gcd(columns, TILE)
    lanes = (-2,) if unit >= 32 else (plgpu.Replicated(32 // unit), -2)
    return plgpu.Layout.TILED(plgpu.Tiling(((unit,), (max(unit // 32, 1),))), (plgpu.Replicated(4),), lanes, -1)


def _bits_of(value: float) -> int:
    return int(np.float32(value).view(np.int32))

"""MXFP4 weights as FP8 blocks without changing one of them, for devices that multiply FP8 only.

An E2M1 magnitude is 1 or 3 times a power of two, and so is an E4M3 code's within 2^-9 .. 448. A 128x128 tile can take
over 1x32 groups of different scales as long as every product fits there under ONE scale. The least scale that holds
the tile's largest value is the best one: a larger scale only pushes small values off the grid. So if it fails, all do.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.formats import FP8_BLOCK, MXFP4
from pallas_kernels.quant.tensor import QuantTensor
from pallas_kernels.typing import typed

_BIAS, _NAN_SCALE = 127, 255
_NAN_CODE = 0x7F  # of E4M3; while converting also of a value that has no code
_GROUP, _TILE = 32, 128
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Magnitude code -> least exponent t such that the magnitude is at most 448 * 2^t. Zero asks for nothing.
_NO_NEED = -(1 << 12)
_LEAST_EXPONENT = np.array([_NO_NEED] + [math.ceil(math.log2(m / 448)) for m in _MAGNITUDES[1:]], np.int16)
_LOWEST_SHIFT, _HIGHEST_SHIFT = -12, 10  # nothing but zero is representable at either end


@functools.cache
def _code_pairs() -> np.ndarray:
    """[shift - _LOWEST_SHIFT, byte of two E2M1 codes] -> the two E4M3 codes of value * 2^shift, as one uint16."""
    values = np.array([*_MAGNITUDES, *(-m for m in _MAGNITUDES)])
    exact = values * np.exp2(np.arange(_LOWEST_SHIFT, _HIGHEST_SHIFT + 1))[:, None]
    codes = np.clip(exact, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    codes = np.where(codes.astype(np.float64) == exact, codes.view(np.uint8), _NAN_CODE).astype(np.uint8)
    byte = np.arange(256)
    return np.stack([codes[:, byte & 15], codes[:, byte >> 4]], axis=-1).view(np.uint16)[..., 0]


@typed
def mxfp4_to_fp8(x: QuantTensor, name: str = "tensor") -> QuantTensor:
    """`x` [..., out, in] in MXFP4 as FP8_BLOCK, every dequantised value the same: bit for bit, NaN groups included.

    Each tile gets the least scale that holds its largest value (1 if all are zero). Runs on the host, one matrix of
    the leading axes at a time. Raises ValueError if x is no MXFP4 tensor, or naming `name` and the first tile whose
    values no scale holds.
    """
    if x.format.layout != MXFP4.layout:
        raise ValueError(f"{name} is {x.format.name}, not {MXFP4.name}")
    x.require_valid()
    values = np.empty(x.shape, FP8_BLOCK.values_dtype)
    scale = np.empty(FP8_BLOCK.scale_shape(x.shape), FP8_BLOCK.scale_dtype)
    for at in np.ndindex(*x.shape[:-2]):
        where = f"{name}{list(at)}" if at else name
        codes, exponents = np.asarray(x.values[at]), np.asarray(x.scale[at]).view(np.uint8)
        values.view(np.uint8)[at], scale.view(np.uint8)[at] = _convert(codes, exponents, where)
    return QuantTensor(jnp.asarray(values), jnp.asarray(scale), FP8_BLOCK)


def _convert(packed: np.ndarray, group_scales: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    """One matrix: (E4M3 codes [out, in], E8M0 codes [out / 128, in / 128]), both uint8."""
    pairs = packed.reshape(len(packed), -1, _GROUP // 2)
    lost = group_scales == _NAN_SCALE
    exponents = group_scales.astype(np.int16) - _BIAS
    largest = np.maximum(np.max(pairs & 7, axis=-1), np.max(pairs >> 4 & 7, axis=-1))
    need = np.where(lost | (largest == 0), _NO_NEED, exponents + _LEAST_EXPONENT[largest])
    tiles = _tile_max(need)
    tiles = np.where(tiles == _NO_NEED, 0, np.clip(tiles, -_BIAS, _BIAS)).astype(np.int16)

    shifts = np.clip(exponents - _spread(tiles, need.shape), _LOWEST_SHIFT, _HIGHEST_SHIFT) - _LOWEST_SHIFT
    converted = _code_pairs().reshape(-1).take(shifts[..., None] * 256 + pairs).view(np.uint8)
    inexact = np.any(converted == _NAN_CODE, axis=-1) & ~lost
    if inexact.any():
        used = np.where(lost | (largest == 0), _NO_NEED, exponents)
        raise ValueError(_refusal(where, inexact, used, packed.shape))
    converted[lost] = _NAN_CODE
    return converted.reshape(len(packed), -1), (tiles + _BIAS).astype(np.uint8)


def _tile_max(groups: np.ndarray) -> np.ndarray:
    """[out, in / 32] -> the largest of each 128x128 tile, partial tiles at the edges included."""
    rows, columns = groups.shape
    across = _TILE // _GROUP
    padding = [(0, -rows % _TILE), (0, -columns % across)]
    filled = np.pad(groups, padding, constant_values=_NO_NEED)
    return filled.reshape(filled.shape[0] // _TILE, _TILE, -1, across).max(axis=(1, 3))


def _spread(tiles: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """One number a tile -> one a 1x32 group of `shape`."""
    return tiles.repeat(_TILE, axis=0).repeat(_TILE // _GROUP, axis=1)[: shape[0], : shape[1]]


def _refusal(where: str, inexact: np.ndarray, used: np.ndarray, packed_shape: tuple[int, ...]) -> str:
    """What is wrong with the first tile that has an inexact group, and what can be done."""
    failing = _tile_max(np.where(inexact, 0, _NO_NEED)) == 0
    row, column = (int(i) for i in np.argwhere(failing)[0])
    inside = used[row * _TILE :, column * _TILE // _GROUP :][:_TILE, : _TILE // _GROUP]
    scales = inside[inside != _NO_NEED]
    bottom, right = min((row + 1) * _TILE, packed_shape[0]), min((column + 1) * _TILE, 2 * packed_shape[1])
    return (
        f"{where}: tile ({row}, {column}), rows {row * _TILE}..{bottom - 1} and columns {column * _TILE}..{right - 1},"
        f" is not exact in E4M3 under one scale (nor are {failing.sum() - 1} of the other {failing.size - 1}): its 1x32"
        f" scales go from 2^{scales.min()} to 2^{scales.max()}, and E4M3 holds 2^-9 to 448. Keep MXFP4, or dequantise"
        " and requantise in FP8, which rounds"
    )

"""Cached rows and queries as wgmma wants them: float16 in the registers of its first operand, on Hopper.

What they are over, and why nothing is lost, ../convert_sm90.py says.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from pallas_kernels.mosaic.addresses import fragmented
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.sparse_attention.held_sm90 import LANES, TILE
from pallas_kernels.sparse_attention.many import gather_sm90 as gather
from pallas_kernels.sparse_attention.many.gather_sm90 import ROWS
from pallas_kernels.sparse_attention.words_sm90 import (
    HEADROOM,
    LEAST,
    Q_LARGEST,
    Q_LEAST,
    across,
    exponent_of,
    power,
    reinterpreted,
    scale_code,
)

Q_ROWS = 32  # heads that a warpgroup converts at once
HALF = 32  # channels of a tile that are multiplied at once, which halves the registers of an operand
# Lanes hold the codes and channels that the words they have loaded become: sixteen in a row of a tile, or eight of
# either half. Rows are those of entries, or heads of q.
OF_CODES = {
    ROWS: plgpu.Layout.TILED(plgpu.Tiling(((ROWS, TILE), (16, TILE), (8, TILE), (16,), (8,))), (-8,), (-4, -3), -1),
    Q_ROWS: plgpu.Layout.TILED(plgpu.Tiling(((Q_ROWS, TILE), (8, TILE), (16,), (8,))), (-6,), (-4, -3), -1),
}
OF_TAIL = {
    ROWS: plgpu.Layout.TILED(plgpu.Tiling(((ROWS, TILE), (16, TILE), (8, TILE), (32,), (8,))), (-8,), (-4, -2), -1),
    Q_ROWS: plgpu.Layout.TILED(plgpu.Tiling(((Q_ROWS, TILE), (8, TILE), (32,), (8,))), (-6,), (-4, -2), -1),
}
# As wgmma has its first operand in registers: pairs of neighbours.
OPERAND = {
    ROWS: plgpu.Layout.WGMMA,
    Q_ROWS: plgpu.Layout.TILED(plgpu.Tiling(((Q_ROWS, 8), (8, 8), (2,))), (-5,), (-3, -2), -1),
}


def layout_of(of_codes: bool, rows: int = ROWS) -> Any:
    """Of a tile of codes, or of bfloat16 channels, in the order of channels."""
    return (OF_CODES if of_codes else OF_TAIL)[rows]


def convert_q(q_smem: Any, measure_smem: Any, rows: Any, scale: float, tiles: int) -> None:
    """`rows` of q_smem [2, H, K / 2], the bits of bfloat16 q, to float16; what its products with entries are to be
    multiplied by, the scale of logits and the entries' own powers of two apart, to measure_smem float32 [H].

    Channels of a tile are in the order of `operands`; the first `tiles` are multiplied with codes.
    """
    sides, _, side = q_smem.shape
    pieces = [q_smem.at[at, rows, pl.ds(column, TILE)] for at in range(sides) for column in range(0, side, TILE)]
    layouts = [layout_of(i < tiles, Q_ROWS) for i in range(len(pieces))]
    held = [plgpu.load(x, layout=of, optimized=False) for x, of in zip(pieces, layouts, strict=True)]
    held = [lax.bitcast_convert_type(x, jnp.bfloat16) for x in held]
    tops = [jnp.max(jnp.abs(x), axis=1) for x in held]
    power_of = jnp.clip(exponent_of(functools.reduce(jnp.maximum, tops)), Q_LEAST, 254)
    for i, (piece, x) in enumerate(zip(pieces, held, strict=True)):
        factor = across(power(2 * 127 + Q_LARGEST - power_of), layouts[i])
        scaled = (x.astype(jnp.float32) * factor).astype(jnp.float16)
        for j, half in enumerate(operands(scaled, i < tiles)):
            piece[:, pl.ds(j * HALF, HALF)] = half
    measure_smem[rows] = power(power_of - Q_LARGEST - HEADROOM) * scale


def operands(x: jax.Array, of_codes: bool) -> tuple[jax.Array, ...]:
    """The halves [rows, HALF] of x [rows, 64], the channels of a tile, as wgmma's first operands, whose order of
    channels is another: lanes keep what they hold. The second operand has to have the same order; the product does not
    depend on it.
    """
    rows = x.shape[0]
    if is_interpreted():
        if of_codes:  # channel 16 t + 2 c + e is at 8 c + 2 t + e
            x = x.reshape(rows, LANES, 8, 2).transpose(0, 2, 1, 3)
        else:
            x = x.reshape(rows, 2, LANES, 4, 2).transpose(0, 1, 3, 2, 4)
        return tuple(jnp.split(x.reshape(rows, TILE), TILE // HALF, axis=1))
    layout, held = OPERAND[rows], layout_of(of_codes, rows)
    found = (plgpu.ShapeDtypeStruct((rows, HALF), x.dtype, layout=layout),) * (TILE // HALF)

    @plgpu.inline_mgpu(arg_types=(held,), return_type=found)
    def rename(_ctx: Any, x: Any) -> tuple[Any, ...]:
        eights = x.registers.reshape(-1, TILE // HALF)  # of each row of a lane: those of either half
        return tuple(_parted(eights[:, half], layout, rows) for half in range(TILE // HALF))

    return tuple(rename(x))


def _parted(eights: np.ndarray, layout: Any, rows: int) -> Any:
    """Neighbours of eight as pairs, those of all rows of a lane side by side."""
    pair = ir.VectorType.get((2,), ir.F16Type.get())
    registers = np.empty(layout.to_mgpu().registers_shape((rows, HALF)), dtype=object)
    for i in range(registers.size):
        block, row = divmod(i, len(eights))
        registers.flat[i] = vector.extract_strided_slice(pair, eights[row], [2 * block], [2], [1])
    return fragmented(registers, layout, None)


def natural(x: jax.Array, tiles: Sequence[bool]) -> tuple[jax.Array, ...]:
    """The tiles [rows, 64] of x [rows, n], an accumulator, with channels in their own order: see `operands`.

    tiles: whether each is one of codes.
    """
    rows = x.shape[0]
    if is_interpreted():
        parts = jnp.split(x, len(tiles), axis=1)
        return tuple(
            part.reshape(rows, 8, LANES, 2).transpose(0, 2, 1, 3).reshape(rows, TILE)
            if of_codes
            else part.reshape(rows, 2, 4, LANES, 2).transpose(0, 1, 3, 2, 4).reshape(rows, TILE)
            for part, of_codes in zip(parts, tiles, strict=True)
        )
    layouts = [layout_of(of_codes, rows) for of_codes in tiles]
    found = tuple(plgpu.ShapeDtypeStruct((rows, TILE), x.dtype, layout=layout) for layout in layouts)

    @plgpu.inline_mgpu(arg_types=(OPERAND[rows],), return_type=found)
    def rename(_ctx: Any, x: Any) -> tuple[Any, ...]:
        kind = ir.VectorType.get((8,), x.mlir_dtype)
        pairs = x.registers.reshape(len(tiles), 8, -1)  # blocks of eight columns, and rows of a lane
        return tuple(_joined(of_tile, kind, layout) for of_tile, layout in zip(pairs, layouts, strict=True))

    return tuple(rename(x))


def _joined(pairs: np.ndarray, kind: ir.Type, layout: Any) -> Any:
    registers = np.empty(layout.to_mgpu().registers_shape((ROWS, TILE)), dtype=object)
    for i in range(registers.size):
        row, half = divmod(i, 2)
        four = pairs[4 * half : 4 * half + 4, row]
        registers.flat[i] = vector.from_elements(kind, [vector.extract(x, [], [e]) for x in four for e in range(2)])
    return fragmented(registers, layout, None)


def exponent(scale: tuple[jax.Array, ...], tiles: int, tail: jax.Array) -> jax.Array:
    """What powers of two rows are divided by to fit float16: 127 + log2, int32 [ROWS].

    No scale of the row's `tiles` tiles is larger, and no bfloat16 channel, words `tail`, 2^9 times as large.
    """
    of_codes = [scale_code(scale, tile) for tile in range(tiles)]
    return jnp.maximum(functools.reduce(jnp.maximum, of_codes), jnp.maximum(of_tail(tail), LEAST))


def of_tail(words: jax.Array) -> jax.Array:
    """The same of bfloat16 channels alone."""
    return exponent_of(jnp.max(jnp.abs(channels(words)), axis=1)) - 8


def of_codes(words: jax.Array, scale: tuple[jax.Array, ...], tile: int, exponent: jax.Array) -> jax.Array:
    """float16 [ROWS, 64]: a tile's codes times its scales over the rows' powers of two, times 2^HEADROOM.

    Exact, but for scales 2^22 times smaller than the row's and more, which lose what float16 has no bits for.
    """
    if is_interpreted():
        codes = lax.bitcast_convert_type(words, jnp.float8_e4m3fn).reshape(ROWS, TILE)
    else:
        codes = reinterpreted(words, jnp.float8_e4m3fn, gather.CODES, OF_CODES[ROWS])
    smaller = jnp.minimum(exponent - scale_code(scale, tile), 40)  # 2^-33 and less is nothing
    return codes.astype(jnp.float16) * across(power(127 + HEADROOM - smaller).astype(jnp.float16), OF_CODES[ROWS])


def of_channels(words: jax.Array, exponent: jax.Array) -> jax.Array:
    """The same of a tile of bfloat16 channels."""
    factor = across(power(2 * 127 + HEADROOM - exponent), OF_TAIL[ROWS])
    return (channels(words).astype(jnp.float32) * factor).astype(jnp.float16)


def channels(words: jax.Array) -> jax.Array:
    """bfloat16 [ROWS, 64] stored as int32 [ROWS, 32]."""
    if is_interpreted():
        return lax.bitcast_convert_type(words, jnp.bfloat16).reshape(ROWS, TILE)
    return reinterpreted(words, jnp.bfloat16, gather.TAIL, OF_TAIL[ROWS])

"""Cached rows and queries as wgmma wants them: float16, each row over a power of two of its own, on Hopper.

E4M3 codes and bfloat16 channels have 4 and 8 significant bits, float16 has 11: what fits its range is exact, and
Hopper turns two codes into float16 at once. A row is divided by the largest of its scales, or more where its rotary
channels are larger still, times 2^-HEADROOM; a head of q by its largest channel, times 2^-Q_LARGEST. What falls short
of float16 then is 2^-28 of the largest at most.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.mosaic.addresses import constant, fragmented, i32
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.sparse_attention import gather_sm90 as gather
from pallas_kernels.sparse_attention.gather_sm90 import ROWS
from pallas_kernels.sparse_attention.held_sm90 import TILE, Loads, Words
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

# Lanes hold the codes and channels that the words they have loaded become. q is read as codes are: where lanes have
# eight channels of either half, two rows of a swizzled tile meet in a bank.
OF_CODES = plgpu.Layout.TILED(plgpu.Tiling(((ROWS, TILE), (8, TILE), (16,), (8,))), (-6,), (-4, -3), -1)
OF_TAIL = plgpu.Layout.TILED(plgpu.Tiling(((ROWS, TILE), (8, TILE), (32,), (8,))), (-6,), (-4, -2), -1)

LOG, POWER, INVERSE = range(3)  # of a row, its power of two


def put(
    words: Words,
    load: Loads,
    row: jax.Array,
    entries_smem: Any,
    measures_smem: Any,
    rows: Any,
) -> None:
    """Rows into `rows` of entries_smem float16 [2, n, K / 2], their powers into those of measures_smem [3, n].

    Channels of entries_smem that rows do not have become zeros. The logarithm of a row that is not seen is -inf.
    Rows without codes are more than registers hold: `load` loads their words, twice.
    """
    halves, _, half = entries_smem.shape
    now = [functools.partial(lambda x: (x,), x) for x in words.tails] if words.codes else load.tails
    power_of = exponent(words, now)
    for tile in range(halves * half // TILE):
        at, column = divmod(tile * TILE, half)
        place = at, rows, pl.ds(column, TILE)
        if tile < len(words.codes):
            entries_smem[place] = dequantised(words, tile, power_of)
        elif (i := tile - len(words.codes)) < len(now):
            entries_smem[place] = scaled(channels(*now[i]()), power(2 * 127 + HEADROOM - power_of), OF_TAIL)
        else:
            entries_smem[place] = plgpu.layout_cast(jnp.zeros((ROWS, TILE), jnp.float16), OF_CODES)
    # Not row < 0: what a loop carries has lost its sign for comparisons.
    measures_smem[LOG, rows] = jnp.where(row == -1, -jnp.inf, (power_of - 127).astype(jnp.float32))
    measures_smem[POWER, rows] = power(power_of)
    measures_smem[INVERSE, rows] = power(2 * 127 - power_of)


def convert_q(q_smem: Any, measure_smem: Any, rows: Any, scale: float) -> None:
    """`rows` of q_smem [2, H, K / 2], the bits of bfloat16 q, to float16; what its products with entries are to be
    multiplied by, the scale of logits and the entries' own powers of two apart, to measure_smem float32 [H].
    """
    halves, _, half = q_smem.shape
    pieces = [q_smem.at[at, rows, pl.ds(column, TILE)] for at in range(halves) for column in range(0, half, TILE)]
    held = [plgpu.load(x, layout=OF_CODES, optimized=False) for x in pieces]
    held = [lax.bitcast_convert_type(x, jnp.bfloat16) for x in held]
    largest = jnp.max(functools.reduce(jnp.maximum, map(jnp.abs, held)), axis=1)
    power_of = jnp.clip(exponent_of(largest), Q_LEAST, 254)
    for piece, x in zip(pieces, held, strict=True):
        piece[...] = scaled(x, power(2 * 127 + Q_LARGEST - power_of), OF_CODES)
    measure_smem[rows] = power(power_of - Q_LARGEST - HEADROOM) * scale


def exponent(words: Words, tails: Sequence[Callable[[], tuple[jax.Array]]]) -> jax.Array:
    """What powers of two rows are divided by to fit float16: 127 + log2, int32 [ROWS].

    No scale of the row is larger, and no bfloat16 channel 2^9 times as large.
    """
    of_codes = [scale_code(words.scale, tile) for tile in range(len(words.codes))]
    of_tails = [exponent_of(jnp.max(jnp.abs(channels(*tail())), axis=1)) - 8 for tail in tails]
    return jnp.maximum(functools.reduce(jnp.maximum, of_codes + of_tails), LEAST)


def dequantised(words: Words, tile: int, exponent: jax.Array) -> jax.Array:
    """float16 [ROWS, 64]: a tile's codes times its scales over the rows' powers of two, times 2^HEADROOM.

    Exact, but for scales 2^22 times smaller than the row's and more, which lose what float16 has no bits for.
    """
    codes = words.codes[tile]
    if is_interpreted():
        codes = lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).reshape(ROWS, TILE)
    else:
        codes = reinterpreted(codes, jnp.float8_e4m3fn, gather.CODES, OF_CODES)
    smaller = jnp.minimum(exponent - scale_code(words.scale, tile), 40)  # 2^-33 and less is nothing
    return codes.astype(jnp.float16) * across(power(127 + HEADROOM - smaller).astype(jnp.float16), OF_CODES)


def scaled(x: jax.Array, factor: jax.Array, layout: Any) -> jax.Array:
    """float16 of bfloat16 x [rows, TILE] of this layout times factor float32 [rows].

    The float32 of a pair's second is its word without the first: one instruction, where Mosaic's way takes two.
    """
    wide = across(factor, layout)
    if is_interpreted():
        return (x.astype(jnp.float32) * wide).astype(jnp.float16)
    found = plgpu.ShapeDtypeStruct(x.shape, jnp.dtype(jnp.float16), layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout, layout), return_type=found)
    def scale(_ctx: Any, x: Any, factor: Any) -> Any:
        registers = np.empty_like(x.registers)
        for at, register in np.ndenumerate(x.registers):
            registers[at] = _scaled(register, vector.extract(factor.registers[at], [], [0]))
        return fragmented(registers, layout, None)

    return scale(x, wide)


def _scaled(register: ir.Value, factor: ir.Value) -> ir.Value:
    """Of neighbours in a row, bfloat16, as float16."""
    count = register.type.shape[0]
    words = vector.bitcast(ir.VectorType.get((count // 2,), i32()), register)
    values = []
    for i in range(count // 2):
        word = vector.extract(words, [], [i])
        pair = arith.shli(word, constant(16)), arith.andi(word, constant(-(1 << 16)))
        values += [arith.mulf(arith.bitcast(ir.F32Type.get(), x), factor) for x in pair]
    wide = vector.from_elements(ir.VectorType.get((count,), ir.F32Type.get()), values)
    return arith.truncf(ir.VectorType.get((count,), ir.F16Type.get()), wide)


def channels(words: jax.Array) -> jax.Array:
    """bfloat16 [ROWS, 64] stored as int32 [ROWS, 32]."""
    if is_interpreted():
        return lax.bitcast_convert_type(words, jnp.bfloat16).reshape(ROWS, TILE)
    return reinterpreted(words, jnp.bfloat16, gather.TAIL, OF_TAIL)

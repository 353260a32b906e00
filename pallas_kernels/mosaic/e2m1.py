"""MXFP4 inside Hopper kernels: E2M1 codes as the register operand of an FP8 wgmma, and their scales.

Nibble n is the E4M3 byte (n & 8) << 4 | (n & 7) << 2, exactly value / 64: sign, exponent and mantissa fall into place,
and what is subnormal in one format is so in the other. Of a row's 16 packed bytes, a K step, a thread holds four: the
fragment that wgmma wants of an 8-bit operand. Their low nibbles are its share of the first 16 columns of the step,
their high ones of the last 16, so that unpacking moves nothing between threads. Columns come out in the order
0, 2 .. 30, 1, 3 .. 31, and the other operand has to be in it.

Pallas has no word for a register of four codes made from one of four bytes, nor for the loads of scales: they are
written in Mosaic. The interpreter, which runs no such code, has a twin of each in jnp.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.mosaic.interpreter import is_interpreted

STEP = 32  # columns of one wgmma of 8-bit operands, and of a scale of MXFP4
ROWS = 64  # of one wgmma
UNIT = 2.0**6  # an unpacked code is value / UNIT
_BYTES = STEP // 2
_CODES = plgpu.Layout.WGMMA_8BIT
_EACH_ROW = plgpu.Layout.WGMMA.reduce(1)  # of a vector with one element a row of an accumulator
# Where each of four codes has its magnitude and its sign, and how far left those move, from low and from high nibbles.
_MAGNITUDES, _SIGNS = np.uint32(0x1C1C1C1C), np.uint32(0x80808080)
_SHIFTS = (2, 4), (-2, 0)
_EXPONENTS = 0x7F800000  # of float32
_LEAST = 1 << 22  # the float32 bits of 2^-127, which is subnormal: the only scale that is not its code << 23


def even_then_odd(x: jax.Array) -> jax.Array:
    """x [..., K] with the columns of every 32 in the order that unpacking makes."""
    pairs = x.reshape(*x.shape[:-1], x.shape[-1] // STEP, _BYTES, 2)
    return jnp.swapaxes(pairs, -1, -2).reshape(x.shape)


def load_codes(packed_smem: Any) -> tuple[jax.Array, ...]:
    """E4M3 [64, 32], as wgmma's register operand, for each K step of packed bytes uint8 [64, 16 steps].

    Four bytes of a row are a register. Seven instructions make two of it: their codes of low and of high nibbles.
    """
    packed = plgpu.load(packed_smem, layout=_CODES)
    steps = packed.shape[1] // _BYTES
    if is_interpreted():
        return tuple(_codes_in_jnp(packed[:, i * _BYTES : (i + 1) * _BYTES]) for i in range(steps))
    codes = plgpu.ShapeDtypeStruct((ROWS, STEP), jnp.float8_e4m3fn, layout=_CODES)
    return plgpu.inline_mgpu(arg_types=(_CODES,), return_type=(codes,) * steps)(_codes_in_mosaic)(packed)


def multiply(accumulator: Any, codes: jax.Array, other_smem: Any, staged_smem: Any) -> None:
    """Issues accumulator [64, n] += codes [64, 32] @ other_smem [32, n], codes from registers.

    The interpreter's wgmma reads memory only: there, and only there, staged_smem [64, 32] hands them on.
    """
    if is_interpreted():
        staged_smem[...] = codes
        plgpu.commit_smem()
        plgpu.wgmma(accumulator, staged_smem, other_smem)
    else:
        plgpu.wgmma(accumulator, codes, other_smem)


def load_scales(scale_smem: Any) -> tuple[jax.Array, ...]:
    """Float32 bits, int32 [64], for each column of UE8M0 scales uint8 [64, columns], 16 columns or a multiple."""
    count = scale_smem.shape[1]
    if is_interpreted():
        codes = scale_smem[...].astype(jnp.int32)
        return tuple(_bits(codes[:, i]) for i in range(count))
    bits = plgpu.ShapeDtypeStruct((ROWS,), jnp.int32, layout=_EACH_ROW)
    return plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=(bits,) * count)(_bits_in_mosaic)(scale_smem)


def scale_product(of_rows: jax.Array, of_tokens: jax.Array) -> jax.Array:
    """float32 [64, n]: scales of rows, bits [64] of `load_scales`, times those of tokens [n], UE8M0 bytes or float32.

    One float product each. The code 255 gives infinity or NaN, never a number, and so does what is too large.
    """
    shape = (ROWS, *of_tokens.shape)
    rows = lax.broadcast_in_dim(of_rows, shape, [0])
    tokens = of_tokens if of_tokens.dtype == jnp.float32 else _bits(of_tokens.astype(jnp.int32))
    tokens = lax.broadcast_in_dim(tokens, shape, [1])
    if is_interpreted() and tokens.dtype == jnp.int32:
        # XLA flushes the subnormal 2^-127 on the CPU, which a GPU multiplies as any other: exponents are added instead.
        code = (rows >> 23) + (tokens >> 23) - 127
        return lax.bitcast_convert_type(jnp.clip(code, 0, 255) << 23, jnp.float32)
    rows, tokens = (x if x.dtype == jnp.float32 else lax.bitcast_convert_type(x, jnp.float32) for x in (rows, tokens))
    return rows * tokens


def _bits(codes: jax.Array) -> jax.Array:
    """Float32 bits of UE8M0 codes int32."""
    return jnp.maximum(codes << 23, _LEAST)


def _codes_in_jnp(packed: jax.Array) -> jax.Array:
    """What `_codes_in_mosaic` makes of one K step uint8 [64, 16]."""
    words = lax.bitcast_convert_type(packed.reshape(ROWS, _BYTES // 4, 4), jnp.uint32)

    def moved(left: int) -> jax.Array:
        return words << left if left > 0 else words >> -left

    halves = [moved(magnitude) & _MAGNITUDES | moved(sign) & _SIGNS for magnitude, sign in _SHIFTS]
    return lax.bitcast_convert_type(jnp.stack(halves, axis=1), jnp.float8_e4m3fn).reshape(ROWS, STEP)


def _codes_in_mosaic(_ctx: Any, packed: mgpu.FragmentedArray) -> tuple[mgpu.FragmentedArray, ...]:
    word = ir.IntegerType.get_signless(32)
    one_word = ir.VectorType.get((1,), word)
    four_codes = ir.VectorType.get((4,), ir.Float8E4M3FNType.get())

    def codes(register: ir.Value, magnitude: int, sign: int) -> ir.Value:
        value = vector.extract(vector.bitcast(one_word, register), [], [0])
        magnitudes = arith.andi(_shift(value, magnitude), _constant(_MAGNITUDES))
        value = arith.ori(magnitudes, arith.andi(_shift(value, sign), _constant(_SIGNS)))
        return vector.bitcast(four_codes, vector.broadcast(one_word, value))

    found = []
    # The second axis of registers counts 16 columns; the others are the rows that a thread has, 8 apart.
    for i in range(packed.registers.shape[1]):
        registers = packed.registers[:, i : i + 1]
        halves = [np.empty_like(registers), np.empty_like(registers)]
        for half, shifts in zip(halves, _SHIFTS, strict=True):
            for at, register in np.ndenumerate(registers):
                half[at] = codes(register, *shifts)
        found.append(_array(np.concatenate(halves, axis=1), _CODES, None))
    return tuple(found)


def _bits_in_mosaic(_ctx: Any, scale_smem: ir.Value) -> tuple[mgpu.FragmentedArray, ...]:
    byte, word = (ir.IntegerType.get_signless(bits) for bits in (8, 32))
    one_word, four_words = (ir.VectorType.get((length,), word) for length in (1, 4))
    count = ir.MemRefType(scale_smem.type).shape[1]
    layout, pointer = _EACH_ROW.to_mgpu(), utils.memref_ptr(scale_smem)
    found = np.empty((count, *layout.registers_shape((ROWS,))), dtype=object)
    for at, (row,) in zip(np.ndindex(*found.shape[1:]), layout.thread_idxs((ROWS,)), strict=True):
        start = arith.muli(arith.index_cast(word, row), _constant(count))
        for first in range(0, count, 16):
            source = utils.getelementptr(pointer, [arith.addi(start, _constant(first))], byte)
            words = llvm.load(four_words, source, alignment=16)
            for i in range(16):
                value = _shift(vector.extract(words, [], [i // 4]), 23 - i % 4 * 8)
                value = arith.maxui(arith.andi(value, _constant(_EXPONENTS)), _constant(_LEAST))
                found[first + i, *at] = vector.broadcast(one_word, value)
    return tuple(_array(registers, _EACH_ROW, True) for registers in found)


def _shift(value: ir.Value, left: int) -> ir.Value:
    return arith.shli(value, _constant(left)) if left > 0 else arith.shrui(value, _constant(-left))


def _constant(bits: int | np.uint32) -> ir.Value:
    """A word with these bits; Mosaic takes signed numbers."""
    bits = int(bits)
    return utils.c(bits - (bits >> 31 << 32), ir.IntegerType.get_signless(32))


def _array(registers: np.ndarray, layout: Any, signed: bool | None) -> mgpu.FragmentedArray:
    return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=signed)

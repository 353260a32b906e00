"""FP4 index keys in registers: E2M1 codes times their UE8M0 scales, as bfloat16 exactly.

The three low bits of a code, moved to the lowest two of bfloat16's exponent and the highest of its fraction, are its
magnitude times 2^-126, zero and the subnormal 0.5 included: one product with 2^126 times the scale makes it right.
Scales are taken over the largest of their key, which comes out of the ReLU. A thread has a word of eight codes of every
row and group: code i of the first four goes beside code i + 4, so that the other operand is `in_word_order`.
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

GROUP, WIDTH = 32, 128
GROUPS = WIDTH // GROUP  # whose scales are the bytes of a word
HALF = 4  # codes of half a word
PACKED = plgpu.Layout.WGMMA_8BIT
OF_KEYS = plgpu.Layout.WGMMA.reduce(1)  # of a vector with one element a row of an accumulator
_UNIT = 126 + 127  # the exponent bits of 2^126
_SIGN, _MAGNITUDE = 0x80008000, 0x01C001C0  # of two codes in their places
_LEAST = 1 << 22  # the float32 bits of 2^-127, which is subnormal: the only scale that is not its code << 23


def in_word_order(x: jax.Array) -> jax.Array:
    """x [..., 128] with the columns of every 32 in the order that unpacking makes."""
    words = x.reshape(*x.shape[:-1], GROUPS, GROUP // (2 * HALF), 2, HALF)
    return jnp.moveaxis(words, -1, -3).reshape(x.shape)


def scales(words: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """float32 [n], the largest scale of each key, and per group int32 [n]: two bfloat16 of 2^126 x its part of that.

    words: int32 [n] of four UE8M0 codes each.
    """
    codes = [(words >> (8 * group)) & 0xFF for group in range(GROUPS)]
    top = jnp.maximum(jnp.maximum(codes[0], codes[1]), jnp.maximum(codes[2], codes[3]))
    parts = [jnp.maximum(_UNIT - top + code, 0) << 7 for code in codes]
    largest = lax.bitcast_convert_type(jnp.maximum(top << 23, _LEAST), jnp.float32)
    return largest, tuple(part | part << 16 for part in parts)


def unpack(packed: jax.Array, parts: tuple[jax.Array, ...]) -> jax.Array:
    """bfloat16 [n, 128], as wgmma's register operand, of packed bytes uint8 [n, 64] in the layout PACKED."""
    shape = packed.shape[0], WIDTH
    if is_interpreted():
        return _unpack_in_jnp(packed, parts)
    values = plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA)
    kinds = PACKED, *[OF_KEYS] * len(parts)
    return plgpu.inline_mgpu(arg_types=kinds, return_type=values)(_unpack)(packed, *parts)


def _unpack_in_jnp(packed: jax.Array, parts: tuple[jax.Array, ...]) -> jax.Array:
    codes = jnp.stack([packed & 0xF, packed >> 4], axis=-1).astype(jnp.int32).reshape(-1, WIDTH)
    exponent, odd = (codes & 6) >> 1, codes & 1
    doubled = jnp.where(exponent == 0, odd, (2 + odd) << jnp.maximum(exponent - 1, 0))
    # XLA flushes subnormals on the CPU: the two powers of 2 are multiplied first here.
    exponents = jnp.stack([(part & 0x7FFF) >> 7 for part in parts], axis=-1) - 127
    part = lax.bitcast_convert_type(jnp.maximum(exponents, 0) << 23, jnp.float32)
    values = jnp.where((codes & 8) != 0, -doubled, doubled).astype(jnp.float32) * jnp.repeat(part, GROUP, axis=-1)
    return in_word_order(values.astype(jnp.bfloat16))


def _unpack(_ctx: Any, packed: mgpu.FragmentedArray, *parts: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    layout, word = plgpu.Layout.WGMMA.to_mgpu(), ir.IntegerType.get_signless(32)
    pair = ir.VectorType.get((2,), ir.BF16Type.get())
    values = np.empty(layout.registers_shape((packed.shape[0], WIDTH)), dtype=object)
    # The second axis of registers counts groups of packed bytes, and of values eight columns; the fifth rows, 8 apart.
    for (tile, group, _, _, row, *_), register in np.ndenumerate(packed.registers):
        codes = vector.extract(vector.bitcast(ir.VectorType.get((1,), word), register), [], [0])
        scale = vector.extract(parts[group].registers[tile, 0, row, 0, 0], [], [0])
        for i in range(HALF):
            sign = arith.andi(_shifted(codes, 12 - 4 * i), _constant(_SIGN))
            magnitude = arith.andi(_shifted(codes, 6 - 4 * i), _constant(_MAGNITUDE))
            args = [arith.ori(sign, magnitude), scale]
            two = llvm.inline_asm(word, args, "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r")
            values[tile, HALF * group + i, 0, 0, row] = utils.bitcast(two, pair)
    return mgpu.FragmentedArray(_registers=values, _layout=layout, _is_signed=None)


def _shifted(x: ir.Value, left: int) -> ir.Value:
    return arith.shli(x, _constant(left)) if left >= 0 else arith.shrui(x, _constant(-left))


def _constant(bits: int) -> ir.Value:
    """A word with these bits; Mosaic takes signed numbers."""
    return utils.c(bits - (bits >> 31 << 32), ir.IntegerType.get_signless(32))

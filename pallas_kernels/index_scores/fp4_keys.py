"""FP4 rows as wgmma's operands: E2M1 as E4M3, the scales of a row's groups folded into its codes.

A row of K channels, an index key or a head's query, is K/2 bytes of codes and K/32 UE8M0 scales. Four neighbouring
lanes share a row, each a quarter of its bytes in one load, and so codes of one group. E2M1 has eight magnitudes: two
registers hold the E4M3 bytes of all of them, and a byte permutation looks four codes up. Magnitude v of a group whose
scale is 2^-d times the row's largest is looked up as v 2^(6-d), exactly for d <= SPREAD: adding to all bytes' exponents
makes that table from the one of 0. Where scales of a row are further apart, codes are looked up in the table of 0 and
one group is multiplied at a time.

Columns come in the order in which lanes hold codes, in keys and in queries alike.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from pallas_kernels.mosaic import e2m1_registers as registers
from pallas_kernels.mosaic.e2m1_registers import CODES, EACH_BLOCK, GROUP, ROWS, SPREAD
from pallas_kernels.mosaic.interpreter import is_interpreted

LANES = 4  # that share a key
OF_KEYS = plgpu.Layout.WGMMA.reduce(1)
SCALAR = plgpu.Layout.WG_SPLAT(())
TABLE = 0x6C686000, 0x7C787470  # E4M3 of 64 times 0, 0.5, 1, 1.5 and 2, 3, 4, 6, lowest byte first
EXPONENTS = 0x08080800, 0x08080808  # one in every byte's exponent; zero stays zero
UNIT = 2.0**-6  # a looked-up code is value / UNIT where its group has the largest scale
BOUND = 2.0**25  # of the products of two rows of codes, which are at most 384^2 x 128


def words_layout(width: int) -> Any:
    """Of int32 [64, width / 8], packed codes: a lane has width / 32 neighbouring words of two keys, 8 apart."""
    words = width // 8
    return plgpu.Layout.TILED(
        plgpu.Tiling(((ROWS, words), (16, words), (8, words), (words // LANES,))), (-7,), (-3, -2), -1
    )


class Scales(NamedTuple):
    """UE8M0 codes of 64 rows: int32 [64] a byte a group, [64, 4] of each lane's group, and [64] the largest."""

    words: jax.Array
    own: jax.Array
    largest: jax.Array

    @classmethod
    def of(cls, words: jax.Array, width: int) -> Scales:
        own = (per_lane(words) >> _shift(width)) & 0xFF
        return cls(words, own, jnp.max(own, axis=1))

    @property
    def below(self) -> jax.Array:
        """int32 [64, 4]: how many powers of two a lane's group is below its row's largest, not above 0."""
        return self.own - per_lane(self.largest)

    def of_group(self, group: Any) -> jax.Array:
        """int32 [64]: the code of one group."""
        return (self.words >> (8 * group)) & 0xFF


def anywhere(spread: jax.Array, layout: Any) -> jax.Array:
    """int32 []: 1 if some element of int32 `spread` is above SPREAD, else 0. All warps of the warpgroup vote."""
    if is_interpreted():
        return jnp.any(spread > SPREAD).astype(jnp.int32)
    answer = plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR)
    return plgpu.inline_mgpu(arg_types=(layout,), return_type=answer)(registers.any_beyond)(spread)


def folded(words: jax.Array, below: jax.Array, width: int) -> jax.Array:
    """E4M3 [64, width] of packed codes int32 [64, width / 8], times 2^below, which is at least -SPREAD."""
    tables = (first + below * one for first, one in zip(TABLE, EXPONENTS, strict=True))
    return look_up(words, *tables, width)


def of_group(words: jax.Array, group: jax.Array, width: int) -> jax.Array:
    """E4M3 [64, width] of packed codes, with zeros for all groups but one."""
    chosen = _shift(width) == 8 * group
    return look_up(words, *(jnp.where(chosen, values, 0) for values in TABLE), width)


def scale_of(code: jax.Array) -> jax.Array:
    """float32 of UE8M0 codes int32; infinity for the code 255."""
    return lax.bitcast_convert_type(jnp.maximum(code << 23, 1 << 22), jnp.float32)


def look_up(words: jax.Array, low: jax.Array, high: jax.Array, width: int) -> jax.Array:
    """E4M3 [64, width] by a table a key and lane: int32 [64, 4] of the first four magnitudes, and of the others."""
    if is_interpreted():
        return _look_up_in_jnp(words, low, high, width)
    codes = plgpu.ShapeDtypeStruct((ROWS, width), jnp.float8_e4m3fn, layout=CODES)
    kinds = words_layout(width), EACH_BLOCK, EACH_BLOCK
    return plgpu.inline_mgpu(arg_types=kinds, return_type=codes)(_look_up)(words, low, high)


def clamped(product: jax.Array) -> jax.Array:
    """max(product, 0) / BOUND of float32 [64, heads], an accumulator, exactly.

    A product that saturates takes a cycle of the units that multiply and add; a maximum takes two of those that look
    codes up.
    """
    if is_interpreted():
        return jnp.maximum(product, 0.0) / BOUND
    layout = plgpu.Layout.WGMMA
    found = plgpu.ShapeDtypeStruct(product.shape, jnp.float32, layout=layout)
    return plgpu.inline_mgpu(arg_types=(layout,), return_type=found)(_clamped)(product)


def by_lanes(x: jax.Array) -> jax.Array:
    """x [..., width] with its columns in the order that looking up makes."""
    width = x.shape[-1]
    of_lanes = x.reshape(*x.shape[:-1], LANES, width // GROUP, 2, 4)
    return jnp.moveaxis(of_lanes, -4, -2).reshape(x.shape)


def per_lane(x: jax.Array) -> jax.Array:
    """int32 [64] for each of a key's lanes."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (ROWS, LANES), [0]), EACH_BLOCK)


def _shift(width: int) -> jax.Array:
    """int32 [64, 4]: where in the word of a key's scales that of a lane's group is."""
    lane = plgpu.broadcasted_iota(jnp.int32, (ROWS, LANES), 1, layout=EACH_BLOCK)
    return (lane >> (LANES * GROUP // width - 1).bit_length()) * 8


def _clamped(_ctx: Any, product: Any) -> Any:
    clamped = np.empty_like(product.registers)
    scale = utils.c(1 / BOUND, ir.F32Type.get())
    for at, register in np.ndenumerate(product.registers):
        values = (vector.extract(register, [], [i]) for i in range(register.type.shape[0]))
        values = [llvm.inline_asm(ir.F32Type.get(), [x, scale], "mul.sat.f32 $0, $1, $2;", "=f,f,f") for x in values]
        clamped[at] = vector.from_elements(register.type, values)
    return mgpu.FragmentedArray(_registers=clamped, _layout=product.layout, _is_signed=None)


def _look_up(_ctx: Any, words: Any, low: Any, high: Any) -> Any:
    layout = CODES.to_mgpu()
    four_codes = ir.VectorType.get((4,), ir.Float8E4M3FNType.get())
    one_word = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
    rows = words.registers.size
    count = words.registers.flat[0].type.shape[0]
    codes = np.empty(layout.registers_shape((ROWS, count * GROUP)), dtype=object)
    of_rows = codes.reshape(2 * count, rows)  # the only axes: 16 columns, and the rows that a thread has
    for row, line in enumerate(words.registers.flat):
        table = tuple(vector.extract(x.registers.flat[row], [], [0]) for x in (low, high))
        for i in range(count):
            for half, four in enumerate(registers.of_word(vector.extract(line, [], [i]), *table)):
                of_rows[2 * i + half, row] = vector.bitcast(four_codes, vector.broadcast(one_word, four))
    return mgpu.FragmentedArray(_registers=codes, _layout=layout, _is_signed=None)


def _look_up_in_jnp(words: jax.Array, low: jax.Array, high: jax.Array, width: int) -> jax.Array:
    nibbles = (words[..., None] >> (4 * jnp.arange(8))[None, None]) & 0xF
    nibbles = nibbles.reshape(ROWS, LANES, width // LANES)
    of_code = jnp.where(nibbles & 4, high[..., None], low[..., None]) >> (8 * (nibbles & 3))
    codes = (of_code & 0xFF | (nibbles & 8) << 4).astype(jnp.uint8).reshape(ROWS, width)
    return lax.bitcast_convert_type(by_lanes(codes), jnp.float8_e4m3fn)

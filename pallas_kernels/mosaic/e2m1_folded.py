"""MXFP4 inside Hopper kernels, scales folded into the codes: 128 columns of E2M1 as E4M3 with one scale for all four
groups of a row.

E2M1 has eight magnitudes, so that two registers hold the E4M3 bytes of all of them, and one byte permutation looks four
codes up. Magnitude v of a group whose scale is 2^-d times the largest one of its row's four is looked up as v 2^(6-d):
adding to all bytes' exponents makes the table of d from that of 0. For d <= SPREAD that is exact, with no subnormal
among them. A kernel asks whether `any_beyond` is among the scales of a warpgroup, and takes one group at a time then.

Four neighbouring columns are a register: of the eight that share a word of packed codes, the first four are a thread's
share of the first 16 columns of a K step of wgmma, the last four of the last 16. The other operand has to be in this
order (`first_and_second_halves`). What Pallas has no word for is in e2m1_registers.py, with a twin in jnp here for the
interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import e2m1_registers as registers
from pallas_kernels.mosaic.e2m1_registers import BLOCK, BLOCKS, GROUP, GROUPS, ROWS, SPREAD
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.scales import scale_bits, scale_product

__all__ = [
    "GROUP", "GROUPS", "SPREAD", "UNIT", "any_beyond", "first_and_second_halves", "load_packed",
    "load_scale_words", "load_tables", "look_up", "multiply", "scale_products", "store_folded_tables", "store_halves",
    "store_tables_of_one",
]  # fmt: skip
UNIT = 2.0**-6  # a looked-up code is value / UNIT, where its group has the largest scale
_TABLE = 0x6C686000, 0x7C787470  # E4M3 of 64 times 0, 0.5, 1, 1.5 and 2, 3, 4, 6, lowest byte first
_EXPONENTS = 0x08080800, 0x08080808  # one in every byte's exponent; zero stays zero


class Table(NamedTuple):
    """E4M3 bytes of the eight magnitudes for a group of columns: int32 of the first four, and of the others."""

    low: jax.Array
    high: jax.Array


def first_and_second_halves(x: jax.Array) -> jax.Array:
    """x [..., K] with the columns of every 32 in the order that looking up makes."""
    eights = x.reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP // 8, 2, 4)
    return jnp.swapaxes(eights, -3, -2).reshape(x.shape)


def store_halves(codes_gmem: Any, codes: jax.Array, layout: Any) -> None:
    """codes_gmem [G, 128] becomes `first_and_second_halves` of codes E4M3 [G, 128]; a thread has four neighbours or
    eight."""
    if is_interpreted():
        codes_gmem[...] = first_and_second_halves(codes)
    else:
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))(registers.store_halves)(codes_gmem, codes)


def load_scale_words(scale_smem: Any) -> jax.Array:
    """int32 [64, 4] of UE8M0 scales uint8 [64, 16]: four of a row and block, the first in the lowest byte.

    Every thread has those of two rows and one block: what is made of scales is made once, and not by all four threads
    that have codes of a row.
    """
    if is_interpreted():
        return lax.bitcast_convert_type(scale_smem[...].reshape(ROWS, BLOCKS, registers.WORD), jnp.int32)
    words = plgpu.ShapeDtypeStruct((ROWS, BLOCKS), jnp.int32, layout=registers.EACH_BLOCK)
    return plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=words)(registers.load_words)(scale_smem)


def any_beyond(scales_smem: Sequence[Any]) -> jax.Array:
    """int32 []: 1 if of UE8M0 scales uint8 [64, 16] those of a row and block are beyond 2^SPREAD apart, else 0."""
    words = [load_scale_words(smem) for smem in scales_smem]
    spreads = [_over_groups(jnp.maximum, word) - _over_groups(jnp.minimum, word) for word in words]
    widest = functools.reduce(jnp.maximum, spreads)
    if is_interpreted():
        return jnp.any(widest > SPREAD).astype(jnp.int32)
    answer = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(()))
    return plgpu.inline_mgpu(arg_types=(registers.EACH_BLOCK,), return_type=answer)(registers.any_beyond)(widest)


def store_folded_tables(tables_smem: Any, scale_smem: Any) -> None:
    """Tables of all groups of four blocks, times their scales over the largest of their block, and that one.

    Right where no scale is beyond the SPREAD. tables_smem: int32 [64, 36], of one warpgroup alone. scale_smem:
    UE8M0 uint8 [64, 16].
    """
    word = load_scale_words(scale_smem)
    top = _over_groups(jnp.maximum, word)
    below = [_code(word, group) - top for group in range(GROUPS)]
    tables = [Table(*(first + d * one for first, one in zip(_TABLE, _EXPONENTS, strict=True))) for d in below]
    _store_tables(tables_smem, tables, scale_bits(top))


def store_tables_of_one(tables_smem: Any, scale_smem: Any, group: jax.Array) -> None:
    """Zeros for all groups of four blocks but one, int32 [], whose scale is that of the block then."""

    def of(other: int, values: int) -> jax.Array:
        chosen = jnp.where(group == other, values, 0)
        return plgpu.layout_cast(jnp.full((ROWS, BLOCKS), chosen, jnp.int32), registers.EACH_BLOCK)

    tables = [Table(*(of(other, values) for values in _TABLE)) for other in range(GROUPS)]
    _store_tables(tables_smem, tables, scale_bits(_code(load_scale_words(scale_smem), group)))


def _store_tables(tables_smem: Any, tables: Sequence[Table], bits: jax.Array) -> None:
    flat = [values for table in tables for values in table]
    if is_interpreted():
        tables_smem[...] = jnp.concatenate([jnp.stack(flat, -1).reshape(ROWS, -1), bits], axis=1)
        return
    kinds = plgpu.RefType(), *[registers.EACH_BLOCK] * (len(flat) + 1)
    plgpu.inline_mgpu(arg_types=kinds)(registers.store_tables)(tables_smem, *flat, bits)


def load_tables(tables_smem: Any, block: Any) -> tuple[tuple[Table, ...], jax.Array]:
    """The four tables of a block, int32 [64] each, and the float32 bits of its scales."""
    of_block = tables_smem.at[:, pl.ds(2 * GROUPS * block, 2 * GROUPS)]
    scales = tables_smem.at[:, pl.ds(2 * GROUPS * BLOCKS + block, 1)]
    if is_interpreted():
        values = of_block[...]
        flat, bits = [values[:, i] for i in range(2 * GROUPS)], scales[...][:, 0]
    else:
        words = plgpu.ShapeDtypeStruct((ROWS,), jnp.int32, layout=registers.EACH_ROW)
        kinds = {"arg_types": (plgpu.RefType(),) * 2, "return_type": (words,) * (2 * GROUPS + 1)}
        *flat, bits = plgpu.inline_mgpu(**kinds)(registers.load_tables)(of_block, scales)
    return tuple(Table(*flat[2 * group : 2 * group + 2]) for group in range(GROUPS)), bits


def _code(word: jax.Array, group: Any) -> jax.Array:
    """The UE8M0 code of one group, of a word of four."""
    return (word >> (8 * group)) & 0xFF


def _over_groups(reduce: Any, word: jax.Array) -> jax.Array:
    return functools.reduce(reduce, (_code(word, group) for group in range(GROUPS)))


def load_packed(packed_smem: Any) -> jax.Array:
    """Packed bytes uint8 [64, 64 blocks] as `look_up` takes them."""
    return plgpu.load(packed_smem, layout=registers.CODES)


def look_up(packed: jax.Array, block: int, tables: Sequence[Table]) -> jax.Array:
    """E4M3 [64, 128], as wgmma's register operand, of one block of packed bytes uint8 [64, 64 blocks].

    tables: of its four groups. Eleven instructions make two registers of a word.
    """
    if is_interpreted():
        return _look_up_in_jnp(packed[:, block * BLOCK // 2 : (block + 1) * BLOCK // 2], tables)
    codes = plgpu.ShapeDtypeStruct((ROWS, BLOCK), jnp.float8_e4m3fn, layout=registers.CODES)
    flat = [word for table in tables for word in table]
    in_mosaic = functools.partial(registers.look_up, block)
    return plgpu.inline_mgpu(arg_types=(registers.CODES, *[registers.EACH_ROW] * len(flat)), return_type=codes)(
        in_mosaic
    )(packed, *flat)


def multiply(accumulator: Any, codes: jax.Array, other_smem: Any, staged_smem: Any) -> None:
    """Issues accumulator [64, n] += codes [64, 128] @ other_smem [128, n], codes from registers.

    The interpreter's wgmma reads memory only: there, and only there, staged_smem [64, 128] hands them on.
    """
    if is_interpreted():
        staged_smem[...] = codes
        plgpu.commit_smem()
        plgpu.wgmma(accumulator, staged_smem, other_smem)
    else:
        plgpu.wgmma(accumulator, codes, other_smem)


def scale_products(of_rows: jax.Array, of_tokens: jax.Array) -> jax.Array:
    """float32 [64, n] of scales of rows, bits [64], times those of tokens [n], bits or float32."""
    shape = (ROWS, *of_tokens.shape)
    return scale_product(lax.broadcast_in_dim(of_rows, shape, [0]), lax.broadcast_in_dim(of_tokens, shape, [1]))


def _look_up_in_jnp(packed: jax.Array, tables: Sequence[Table]) -> jax.Array:
    nibbles = jnp.stack([packed & 0xF, packed >> 4], axis=-1).astype(jnp.int32).reshape(ROWS, GROUPS, GROUP)
    low, high = (jnp.stack(words, axis=1)[..., None] for words in zip(*tables, strict=True))
    of_code = jnp.where(nibbles & 4, high, low) >> (8 * (nibbles & 3))
    codes = (of_code & 0xFF | (nibbles & 8) << 4).astype(jnp.uint8).reshape(ROWS, BLOCK)
    return lax.bitcast_convert_type(first_and_second_halves(codes), jnp.float8_e4m3fn)

"""Cached rows named one by one, from device memory to registers, on Hopper.

A warpgroup holds ROWS rows as wgmma's first operand has them: a warp sixteen, four lanes hold a row, and another eight
below. Every lane loads its own 16 bytes at an address of its own, so that rows may lie anywhere and no shared memory
waits for them; a row that is not seen is not read and comes out as zeros. Rows come as words of four bytes, which stay
in registers until they are used: of a row, a tile of 64 codes is one load of a lane, the rotary channels are two, the
scales one.

Pallas loads rows that are neighbours only: this is written in Mosaic. The interpreter, which runs no such code, has a
twin in jnp.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.mosaic.addresses import (
    address_of,
    behind,
    constant,
    fragmented,
    i32,
    load_words,
    scalar,
    times,
    vector_of,
)
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.sparse_attention.gather_sm90 import Parts, Piece, start_of

ROWS = 64  # that a warpgroup holds at once
TILE = 64  # channels that share a scale
LANES = 4  # of a row
WORDS = TILE // 4  # of a tile of codes
# Four neighbouring lanes a row: 16 bytes of a tile of codes each, or of either half of the rotary channels.
CODES = plgpu.Layout.TILED(plgpu.Tiling(((ROWS, WORDS), (16, WORDS), (8, WORDS), (4,))), (-7,), (-3, -2), -1)
TAIL = plgpu.Layout.TILED(
    plgpu.Tiling(((ROWS, 2 * WORDS), (16, 2 * WORDS), (8, 2 * WORDS), (16,), (4,))), (-8,), (-4, -2), -1
)
EACH_ROW = CODES.reduce(1)  # of a vector with one element a row


def pieces(parts: Parts) -> tuple[tuple[Piece, ...], ...]:
    """What a row is loaded in: for each of Loads."""
    codes, scale = (), ()
    if parts.codes is not None and parts.scale is not None:
        sizes = [min(TILE, parts.codes.size - begin) for begin in range(0, parts.codes.size, TILE)]
        codes = tuple(Piece(parts.codes, i * TILE, size, (ROWS, WORDS), CODES) for i, size in enumerate(sizes))
        scale = (Piece(parts.scale, 0, parts.scale.size, (ROWS,), EACH_ROW),)
    most = 2 * TILE
    sizes = [min(most, parts.tail.size - begin) for begin in range(0, parts.tail.size, most)]
    tails = tuple(Piece(parts.tail, i * most, size, (ROWS, 2 * WORDS), TAIL) for i, size in enumerate(sizes))
    return codes, tails, scale


def load(
    arrays_gmem: Sequence[tuple[Any, ...]],
    of_each: Sequence[Piece],
    places: Sequence[tuple[jax.Array, jax.Array]],
    second: jax.Array,
) -> tuple[jax.Array, ...]:
    """A piece of row row[i] of page page[i], int32 [ROWS] in EACH_ROW; zeros where row[i] is negative.

    arrays_gmem, of_each, places: for each of one or two sources its arrays, its piece, and page and row if it is this
    one. second: int32, 1 for the second one.
    """
    if is_interpreted():
        found = [_load_in_jnp(*source) for source in zip(arrays_gmem, of_each, places, strict=True)]
        return tuple(jnp.where(second == 1, words[-1], words[0]) for words in zip(*found, strict=True))
    piece = of_each[0]
    count = piece.size // 4 if piece.layout == EACH_ROW else 1
    found = (plgpu.ShapeDtypeStruct(piece.shape, jnp.dtype(jnp.int32), layout=piece.layout),) * count
    arguments = [tuple(plgpu.RefType() for _ in arrays) for arrays in arrays_gmem]
    of_places = [(EACH_ROW, EACH_ROW) for _ in places]

    @plgpu.inline_mgpu(arg_types=(arguments, of_places, plgpu.Layout.WG_SPLAT(())), return_type=found)
    def run(_ctx: Any, arrays: list[Any], places: list[Any], second: Any) -> tuple[Any, ...]:
        return tuple(_load_in_mosaic(arrays, of_each, places, second))

    return tuple(run(list(arrays_gmem), list(places), second))


def look_up(table_gmem: Any, sequence: jax.Array, index: jax.Array) -> jax.Array:
    """table[sequence, index[i]] of an int32 table, for index int32 [ROWS] in EACH_ROW."""
    if is_interpreted():
        return table_gmem[...][sequence, index]
    found = plgpu.ShapeDtypeStruct((ROWS,), jnp.dtype(jnp.int32), layout=EACH_ROW)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), EACH_ROW), return_type=found)
    def look(_ctx: Any, line: ir.Value, index: Any) -> Any:
        start = address_of(line)
        registers = np.empty_like(index.registers)
        for at, register in np.ndenumerate(index.registers):
            offset = times(scalar(register), 4)
            (value,) = load_words(arith.addi(start, offset), 1)
            registers[at] = vector.broadcast(ir.VectorType.get((1,), i32()), value)
        return fragmented(registers, EACH_ROW)

    return look(table_gmem.at[sequence], index)


def _load_in_jnp(arrays_gmem: tuple[Any, ...], piece: Piece, place: tuple[jax.Array, jax.Array]) -> list[jax.Array]:
    """What `_load_in_mosaic` loads."""
    part, array = piece.part, arrays_gmem[piece.part.array][...]
    page, row = place
    flat = lax.bitcast_convert_type(array, jnp.uint8).reshape(-1)

    # Row by row: XLA gives what is large to its threads, of which the interpreter's may have taken all.
    def cut(at: tuple[jax.Array, jax.Array]) -> jax.Array:
        page, row = (jnp.maximum(x, 0) for x in at)
        return lax.dynamic_slice(flat, (page * part.page + row * part.row + part.begin + piece.begin,), (piece.size,))

    found = jnp.where(row[:, None] >= 0, lax.map(cut, (page, row)), 0)
    if piece.layout == EACH_ROW:
        words = _words(found)
        return [words[:, i] for i in range(piece.size // 4)]
    size = 4 * math.prod(piece.shape[1:])
    return [_words(jnp.pad(found, ((0, 0), (0, size - piece.size))))]


def _words(x: jax.Array) -> jax.Array:
    """int32 [n, m / 4] of bytes [n, m]. (A chain of bitcasts to 32 and then 16 bits does not get past XLA.)"""
    four = x.reshape(x.shape[0], -1, 4).astype(jnp.int32)
    return functools.reduce(jnp.bitwise_or, (four[..., i] << (8 * i) for i in range(4)))


def _load_in_mosaic(arrays: list[Any], of_each: Sequence[Piece], places: list[Any], second: Any) -> list[Any]:
    second = arith.cmpi(arith.CmpIPredicate.eq, scalar(second.registers.item()), constant(1))
    lane = arith.andi(utils.thread_idx(), constant(LANES - 1))
    rows = zip(*(held(*place) for place in places), strict=True)
    loaded = [_load_row(arrays, of_each, places_of_row, second, lane) for places_of_row in rows]
    piece = of_each[0]
    shape = piece.layout.to_mgpu().registers_shape(piece.shape)
    if piece.layout != EACH_ROW:
        return [fragmented(_array([x for of_row in loaded for x in of_row], shape), piece.layout)]
    words = zip(*([vector_of([word]) for word in of_row] for of_row in loaded), strict=True)
    return [fragmented(_array(list(x), shape), EACH_ROW) for x in words]


def _load_row(
    arrays: list[Any], of_each: Sequence[Piece], places: Sequence[Any], second: ir.Value, lane: ir.Value
) -> list[ir.Value]:
    """What a lane loads of a piece of one row: registers of 16 bytes, or in EACH_ROW words."""
    row = places[0][1]  # not seen in one source, not in the other
    seen = arith.cmpi(arith.CmpIPredicate.sge, row, constant(0))
    piece, begins = of_each[0], [x.part.begin + x.begin for x in of_each]
    starts = [start_of(of, x.part, *at) for of, x, at in zip(arrays, of_each, places, strict=True)]
    begin = begins[0]
    if len(set(begins)) > 1:
        starts, begin = [behind(*x) for x in zip(starts, begins, strict=True)], 0
    start = starts[0]
    if len(starts) > 1:
        start = arith.select(second, starts[1], starts[0])
    if piece.layout == EACH_ROW:
        return load_words(behind(start, begin), piece.size // 4, seen)
    start = arith.addi(start, times(lane, 16))
    registers = []
    for i in range(piece.shape[1] // WORDS):
        lanes = (piece.size - i * TILE) // 16  # that have something to load
        if lanes <= 0:
            registers.append(vector_of([constant(0)] * 4))
            continue
        mine = seen
        if lanes < LANES:
            mine = arith.andi(seen, arith.cmpi(arith.CmpIPredicate.slt, lane, constant(lanes)))
        registers.append(vector_of(load_words(behind(start, begin + i * TILE), 4, mine)))
    return registers


def held(pages: Any, rows: Any) -> list[tuple[ir.Value, ir.Value]]:
    """Page and row of each row that a lane has a part of."""
    return [(scalar(page), scalar(row)) for page, row in zip(pages.registers.flat, rows.registers.flat, strict=True)]


def _array(registers: list[ir.Value], shape: tuple[int, ...]) -> np.ndarray:
    found = np.empty(len(registers), dtype=object)
    for i, register in enumerate(registers):
        found[i] = register
    return found.reshape(shape)

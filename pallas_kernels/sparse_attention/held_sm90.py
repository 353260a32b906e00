"""Cached rows named one by one, from device memory to registers, on Hopper.

Four neighbouring lanes hold a row. Every lane loads its own 16 bytes at an address of its own, so that rows may lie
anywhere and no shared memory waits for them; a row that is not seen is not read and comes out as zeros. Rows come as
words of four bytes, which stay in registers until they are used: of a row, a tile of 64 codes is one load of a lane,
the rotary channels are two, the scales one.

Pallas loads rows that are neighbours only: this is written in Mosaic. The interpreter, which runs no such code, has a
twin in jnp.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

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

TILE = 64  # channels that share a scale
LANES = 4  # of a row
WORDS = TILE // 4  # of a tile of codes


@dataclass(frozen=True)
class Part:
    """Where `size` bytes of every row lie: row r of page p at p * page + r * row + begin of the array `array`."""

    array: int
    page: int
    row: int
    begin: int
    size: int


@dataclass(frozen=True)
class Parts:
    """Of rows of E4M3 codes, a scale byte for every 64 of them, and bfloat16 channels; or of the last alone."""

    codes: Part | None
    tail: Part
    scale: Part | None

    @property
    def tiles(self) -> int:
        return 0 if self.codes is None else -(-self.codes.size // TILE)

    @property
    def tails(self) -> int:
        return -(-self.tail.size // (2 * TILE))


class Words(NamedTuple):
    """Rows as they are stored, int32: tiles of 64 codes [rows, 16], tails of 64 channels [rows, 32], and [rows] for
    every four scales. What a row does not fill is zeros.
    """

    codes: tuple[jax.Array, ...]
    tails: tuple[jax.Array, ...]
    scale: tuple[jax.Array, ...]


class Loads(NamedTuple):
    """Functions that load Words, each what there is of them in one load."""

    codes: tuple[Callable[[], tuple[jax.Array, ...]], ...]
    tails: tuple[Callable[[], tuple[jax.Array, ...]], ...]
    scale: tuple[Callable[[], tuple[jax.Array, ...]], ...]


class Piece(NamedTuple):
    """`size` bytes of a part from `begin` on, in registers of this shape and layout; in `each_row` as several words."""

    part: Part
    begin: int
    size: int
    shape: tuple[int, ...]
    layout: Any


@dataclass(frozen=True)
class Held:
    """How a warpgroup holds `rows` rows: layouts of a tile of codes [rows, 16] and of bfloat16 channels [rows, 32]."""

    rows: int
    codes: Any
    tail: Any

    @property
    def each_row(self) -> Any:
        """Of a vector with one element a row."""
        return self.codes.reduce(1)

    def pieces(self, parts: Parts) -> tuple[tuple[Piece, ...], ...]:
        """What a row is loaded in: for each of Loads."""
        codes, scale = (), ()
        if parts.codes is not None and parts.scale is not None:
            sizes = [min(TILE, parts.codes.size - begin) for begin in range(0, parts.codes.size, TILE)]
            codes = tuple(
                Piece(parts.codes, i * TILE, size, (self.rows, WORDS), self.codes) for i, size in enumerate(sizes)
            )
            scale = (Piece(parts.scale, 0, parts.scale.size, (self.rows,), self.each_row),)
        most = 2 * TILE
        sizes = [min(most, parts.tail.size - begin) for begin in range(0, parts.tail.size, most)]
        tails = tuple(
            Piece(parts.tail, i * most, size, (self.rows, 2 * WORDS), self.tail) for i, size in enumerate(sizes)
        )
        return codes, tails, scale

    def load(
        self,
        arrays_gmem: Sequence[tuple[Any, ...]],
        of_each: Sequence[Piece],
        places: Sequence[tuple[jax.Array, jax.Array]],
        second: jax.Array,
    ) -> tuple[jax.Array, ...]:
        """A piece of row row[i] of page page[i], int32 [rows] in `each_row`; zeros where row[i] is negative.

        arrays_gmem, of_each, places: for each of one or two sources its arrays, its piece, and page and row if it is
        this one. second: int32, 1 for the second one.
        """
        if is_interpreted():
            found = [self._load_in_jnp(*source) for source in zip(arrays_gmem, of_each, places, strict=True)]
            return tuple(jnp.where(second == 1, words[-1], words[0]) for words in zip(*found, strict=True))
        piece = of_each[0]
        count = piece.size // 4 if piece.layout == self.each_row else 1
        found = (plgpu.ShapeDtypeStruct(piece.shape, jnp.dtype(jnp.int32), layout=piece.layout),) * count
        arguments = [tuple(plgpu.RefType() for _ in arrays) for arrays in arrays_gmem]
        of_places = [(self.each_row, self.each_row) for _ in places]

        @plgpu.inline_mgpu(arg_types=(arguments, of_places, plgpu.Layout.WG_SPLAT(())), return_type=found)
        def run(_ctx: Any, arrays: list[Any], places: list[Any], second: Any) -> tuple[Any, ...]:
            return tuple(self._load_in_mosaic(arrays, of_each, places, second))

        return tuple(run(list(arrays_gmem), list(places), second))

    def look_up(self, table_gmem: Any, sequence: jax.Array, index: jax.Array) -> jax.Array:
        """table[sequence, index[i]] of an int32 table, for index int32 [rows] in `each_row`."""
        if is_interpreted():
            return table_gmem[...][sequence, index]
        found = plgpu.ShapeDtypeStruct((self.rows,), jnp.dtype(jnp.int32), layout=self.each_row)

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), self.each_row), return_type=found)
        def look(_ctx: Any, line: ir.Value, index: Any) -> Any:
            start = address_of(line)
            registers = np.empty_like(index.registers)
            for at, register in np.ndenumerate(index.registers):
                offset = times(scalar(register), 4)
                (value,) = load_words(arith.addi(start, offset), 1)
                registers[at] = vector.broadcast(ir.VectorType.get((1,), i32()), value)
            return fragmented(registers, self.each_row)

        return look(table_gmem.at[sequence], index)

    def prefetch(self, arrays_gmem: tuple[Any, ...], parts: Parts, page: jax.Array, row: jax.Array) -> None:
        """Asks for rows page[i], row[i] as far as the L2 cache; for those that are not seen (row -1) not."""
        if is_interpreted():
            return

        @plgpu.inline_mgpu(arg_types=(tuple(plgpu.RefType() for _ in arrays_gmem), self.each_row, self.each_row))
        def prefetch(_ctx: Any, arrays: tuple[ir.Value, ...], pages: Any, rows: Any) -> None:
            lane = arith.andi(utils.thread_idx(), constant(LANES - 1))
            for page, row in held(pages, rows):
                prefetch_row(arrays, parts, page, row, lane)

        prefetch(arrays_gmem, page, row)

    def _load_in_jnp(
        self, arrays_gmem: tuple[Any, ...], piece: Piece, place: tuple[jax.Array, jax.Array]
    ) -> list[jax.Array]:
        """What `_load_in_mosaic` loads."""
        part, array = piece.part, arrays_gmem[piece.part.array][...]
        page, row = place
        flat = lax.bitcast_convert_type(array, jnp.uint8).reshape(-1)

        # Row by row: XLA gives what is large to its threads, of which the interpreter's may have taken all.
        def cut(at: tuple[jax.Array, jax.Array]) -> jax.Array:
            page, row = (jnp.maximum(x, 0) for x in at)
            return lax.dynamic_slice(
                flat, (page * part.page + row * part.row + part.begin + piece.begin,), (piece.size,)
            )

        found = jnp.where(row[:, None] >= 0, lax.map(cut, (page, row)), 0)
        if piece.layout == self.each_row:
            words = _words(found)
            return [words[:, i] for i in range(piece.size // 4)]
        size = 4 * math.prod(piece.shape[1:])
        return [_words(jnp.pad(found, ((0, 0), (0, size - piece.size))))]

    def _load_in_mosaic(self, arrays: list[Any], of_each: Sequence[Piece], places: list[Any], second: Any) -> list[Any]:
        second = arith.cmpi(arith.CmpIPredicate.eq, scalar(second.registers.item()), constant(1))
        lane = arith.andi(utils.thread_idx(), constant(LANES - 1))
        rows = zip(*(held(*place) for place in places), strict=True)
        loaded = [self._load_row(arrays, of_each, places_of_row, second, lane) for places_of_row in rows]
        piece = of_each[0]
        shape = piece.layout.to_mgpu().registers_shape(piece.shape)
        if piece.layout != self.each_row:
            return [fragmented(_array([x for of_row in loaded for x in of_row], shape), piece.layout)]
        words = zip(*([vector_of([word]) for word in of_row] for of_row in loaded), strict=True)
        return [fragmented(_array(list(x), shape), self.each_row) for x in words]

    def _load_row(
        self, arrays: list[Any], of_each: Sequence[Piece], places: Sequence[Any], second: ir.Value, lane: ir.Value
    ) -> list[ir.Value]:
        """What a lane loads of a piece of one row: registers of 16 bytes, or in `each_row` words."""
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
        if piece.layout == self.each_row:
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


def prefetch_row(arrays: tuple[ir.Value, ...], parts: Parts, page: ir.Value, row: ir.Value, lane: ir.Value) -> None:
    """Each lane of a row asks for a piece of its own."""
    bulk = "cp.async.bulk.prefetch.L2.global [$0], {};"
    pieces = [(parts.tail, bulk.format(parts.tail.size))]
    if parts.codes is not None and parts.scale is not None:
        size = parts.codes.size + parts.tail.size
        if replace(parts.codes, begin=parts.codes.begin + parts.codes.size, size=parts.tail.size) == parts.tail:
            pieces = [(parts.codes, bulk.format(size))]  # one behind the other
        else:
            pieces.append((parts.codes, bulk.format(parts.codes.size)))
        pieces.append((parts.scale, "prefetch.global.L2 [$0];"))
    seen = arith.cmpi(arith.CmpIPredicate.sge, row, constant(0))
    for i, (part, instruction) in enumerate(pieces):
        here = arith.andi(seen, arith.cmpi(arith.CmpIPredicate.eq, lane, constant(i)))
        ask = f"{{ .reg .pred p; setp.ne.b32 p, $1, 0; @p {instruction} }}"
        address = behind(start_of(arrays, part, page, row), part.begin)
        operands = [address, arith.extui(i32(), here)]
        llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, ask, "l,r", has_side_effects=True)


def _words(x: jax.Array) -> jax.Array:
    """int32 [n, m / 4] of bytes [n, m]. (A chain of bitcasts to 32 and then 16 bits does not get past XLA.)"""
    four = x.reshape(x.shape[0], -1, 4).astype(jnp.int32)
    return functools.reduce(jnp.bitwise_or, (four[..., i] << (8 * i) for i in range(4)))


def _array(registers: list[ir.Value], shape: tuple[int, ...]) -> np.ndarray:
    found = np.empty(len(registers), dtype=object)
    for i, register in enumerate(registers):
        found[i] = register
    return found.reshape(shape)


def start_of(arrays: tuple[ir.Value, ...], part: Part, page: ir.Value, row: ir.Value) -> ir.Value:
    """Where a row is, but for the constant where a part of it begins: several parts share this address."""
    return arith.addi(address_of(arrays[part.array]), arith.addi(times(page, part.page), times(row, part.row)))

"""Blocks of FP8 entries in shared memory as they are stored, copied by cp.async from wherever they lie, on Hopper.

Four neighbouring lanes copy a row, a piece of every tile each, and a scorer's read it so; where, place_sm90.py says.
An unseen row comes as zeros and is not read. The interpreter's twins leave everything in its natural order.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.mosaic.addresses import behind, constant, fragmented, i32, i64, vector_of
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.sparse_attention.held_sm90 import LANES, WORDS, Parts, Piece, held, start_of
from pallas_kernels.sparse_attention.many import convert_sm90 as convert
from pallas_kernels.sparse_attention.many import gather_sm90 as gather
from pallas_kernels.sparse_attention.many.gather_sm90 import EACH_ROW
from pallas_kernels.sparse_attention.staged.place_sm90 import (
    BLOCK,
    CODES,
    PIECE,
    ROW,
    TAIL,
    TAIL_TILE,
    Thread,
    bit,
    place_of,
    times,
    words_at,
)

ROW_WORDS = ROW // 4


def takes(parts: Parts) -> bool:
    return parts.codes is not None and (parts.codes.size, parts.tail.size) == (CODES, TAIL)


def copy(arrays_gmem: tuple[Any, ...], parts: Parts, place: tuple[jax.Array, jax.Array], stage_smem: Any) -> None:
    """Starts copies of BLOCK rows into stage_smem int32 [BLOCK, ROW_WORDS]: rows and pages are `place`."""
    if is_interpreted():
        codes, tails, _ = gather.HELD.pieces(parts)
        for begin, piece in zip(range(0, ROW_WORDS, WORDS), (*codes, *tails), strict=False):
            (words,) = _loaded(arrays_gmem, piece, place)
            stage_smem[:, pl.ds(begin, words.shape[1])] = words
        return

    @plgpu.inline_mgpu(arg_types=(tuple(plgpu.RefType() for _ in arrays_gmem), EACH_ROW, EACH_ROW, plgpu.RefType()))
    def run(_ctx: Any, arrays: tuple[ir.Value, ...], pages: Any, rows: Any, stage: ir.Value) -> None:
        thread, to = Thread(), place_of(stage)
        for half, (page, row) in enumerate(held(pages, rows)):
            _copy_row(arrays, parts, page, row, thread, arith.addi(to, times(thread.place(half), ROW)))

    run(arrays_gmem, *place, stage_smem)


def scales(arrays_gmem: tuple[Any, ...], parts: Parts, place: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
    """The rows' scales, as words."""
    (piece,) = gather.HELD.pieces(parts)[2]
    return _loaded(arrays_gmem, piece, place)


def _loaded(arrays_gmem: tuple[Any, ...], piece: Piece, place: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
    return gather.HELD.load([arrays_gmem], [piece], [place], jnp.int32(0))


def wait() -> None:
    """Until what this thread has asked for is there."""
    if is_interpreted():
        return

    @plgpu.inline_mgpu(arg_types=())
    def run(_ctx: Any) -> None:
        llvm.inline_asm(None, [], "cp.async.wait_all;", "~{memory}", has_side_effects=True)

    run()


def codes(stage_smem: Any, tile: int) -> jax.Array:
    """The words of a tile of codes, as a scorer has them: int32 [BLOCK, 16] in gather.CODES."""
    return _load(stage_smem, (4 * tile,), gather.CODES)


def tail(stage_smem: Any) -> jax.Array:
    """The words of the bfloat16 channels: int32 [BLOCK, 32] in gather.TAIL."""
    return _load(stage_smem, (4 * TAIL_TILE, 4 * TAIL_TILE + 4), gather.TAIL)


def put_tail(stage_smem: Any, values: jax.Array) -> None:
    """float16 [BLOCK, 64], as `convert.of_channels` makes them, where the bfloat16 channels were."""
    if is_interpreted():
        bits = lax.bitcast_convert_type(values, jnp.uint16).astype(jnp.int32).reshape(BLOCK, -1, 2)
        stage_smem[:, pl.ds(CODES // 4, TAIL // 4)] = bits[..., 0] | bits[..., 1] << 16
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), convert.layout_of(False)))
    def run(_ctx: Any, stage: ir.Value, values: Any) -> None:
        thread, start = Thread(), place_of(stage)
        for i, register in enumerate(values.registers.flat):
            row, half = divmod(i, 2)
            address = thread.piece_of_row(start, row, 4 * TAIL_TILE + 4 * half)
            words = llvm.bitcast(ir.VectorType.get((4,), i32()), register)
            values_of = [llvm.extractelement(words, constant(j)) for j in range(4)]
            store = "st.shared.v4.b32 [$0], {$1, $2, $3, $4};"
            llvm.inline_asm(None, [address, *values_of], store, "r,r,r,r,r,~{memory}", has_side_effects=True)

    run(stage_smem, values)


def _copy_row(
    arrays: tuple[ir.Value, ...], parts: Parts, page: ir.Value, row: ir.Value, thread: Thread, row_smem: ir.Value
) -> None:
    assert parts.codes is not None
    seen = arith.cmpi(arith.CmpIPredicate.sge, row, constant(0))
    size = arith.select(seen, constant(PIECE), constant(0))
    row = arith.maxsi(row, constant(0))  # what is not read has an address all the same
    offset = arith.extui(i64(), times(thread.lane, PIECE))
    to = arith.addi(row_smem, times(arith.xori(thread.lane, times(bit(thread.group, 2), 2)), PIECE))
    of_codes = arith.addi(behind(start_of(arrays, parts.codes, page, row), parts.codes.begin), offset)
    of_tail = behind(of_codes, CODES)
    if replace(parts.codes, begin=parts.codes.begin + CODES, size=TAIL) != parts.tail:
        of_tail = arith.addi(behind(start_of(arrays, parts.tail, page, row), parts.tail.begin), offset)
    for begin in range(0, ROW, LANES * PIECE):
        source = behind(of_codes, begin) if begin < CODES else behind(of_tail, begin - CODES)
        operands = [arith.addi(to, constant(begin)), source, size]
        ask = "cp.async.cg.shared.global [$0], [$1], 16, $2;"
        llvm.inline_asm(None, operands, ask, "r,l,r,~{memory}", has_side_effects=True)


def _load(stage_smem: Any, firsts: tuple[int, ...], layout: Any) -> jax.Array:
    """Of every row this lane's piece of the four from each of `firsts` on."""
    shape = BLOCK, len(firsts) * WORDS
    if is_interpreted():
        return stage_smem[:, pl.ds(4 * firsts[0], shape[1])]
    found = plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.int32), layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=found)
    def run(_ctx: Any, stage: ir.Value) -> Any:
        thread, start = Thread(), place_of(stage)
        registers = np.empty(2 * len(firsts), dtype=object)
        for i in range(len(registers)):
            row, of_first = divmod(i, len(firsts))
            registers[i] = vector_of(words_at(thread.piece_of_row(start, row, firsts[of_first]), 4))
        return fragmented(registers.reshape(layout.to_mgpu().registers_shape(shape)), layout)

    return run(stage_smem)

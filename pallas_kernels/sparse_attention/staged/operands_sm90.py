"""Staged entries turned round, as wgmma has a first operand in registers: channels as rows, on Hopper.

Channel 64 w + 8 g + 2 m + h of an adder's 256 is row 16 w + 8 h + g of operand m: a lane has eight neighbouring
channels, of four entries a step. Bytes of two entries are put side by side by one permutation for two channels, and
made float16 in pairs. The last of an adder's warps may have what is float16 already.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from pallas_kernels.mosaic.addresses import constant, fragmented, i32, scalar
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.sparse_attention.held_sm90 import TILE
from pallas_kernels.sparse_attention.staged.place_sm90 import (
    BLOCK,
    CODES,
    PIECE,
    ROW,
    TAIL_TILE,
    TILES,
    Thread,
    bit,
    place_of,
    times,
    words_at,
)

STEP = 16  # rows of an operand: wgmma's K
OPERANDS = 4  # of 64 channels, an adder's
OPERAND = plgpu.Layout.WGMMA


def operands(stage_smem: Any, factors_smem: Any, adder: jax.Array, step: int) -> tuple[jax.Array, ...]:
    """float16 [64, STEP], OPERANDS of them: an adder's channels of rows step * STEP on, as wgmma has a first operand.

    factors_smem float16 [TILES, BLOCK]: what codes are to be multiplied by. Rows are in their own order again.
    """
    if is_interpreted():
        return _operands_in_jnp(stage_smem, factors_smem, adder, step)
    found = (plgpu.ShapeDtypeStruct((64, STEP), jnp.dtype(jnp.float16), layout=OPERAND),) * OPERANDS

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT(())), return_type=found)
    def run(_ctx: Any, stage: ir.Value, factors: ir.Value, adder: Any) -> tuple[Any, ...]:
        thread = Thread()
        tile = arith.addi(times(scalar(adder.registers.item()), 4), thread.warp)
        is_tail = arith.cmpi(arith.CmpIPredicate.eq, tile, constant(TAIL_TILE))
        # A register is a channel of two rows; in wgmma's order [operand, half of rows, half of channels].
        kinds = [i32()] * (4 * OPERANDS)
        branch = scf.IfOp(is_tail, kinds, has_else=True)
        with ir.InsertionPoint(branch.then_block):
            scf.yield_(_of_tail(place_of(stage), thread, step))
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(_of_codes(place_of(stage), place_of(factors), thread, tile, step))
        pair = ir.VectorType.get((2,), ir.F16Type.get())
        registers = [llvm.bitcast(pair, x) for x in branch.results]
        shape = OPERAND.to_mgpu().registers_shape((64, STEP))
        made = []
        for m in range(OPERANDS):
            four = np.empty(4, dtype=object)
            for i in range(4):
                four[i] = registers[4 * m + i]
            made.append(fragmented(four.reshape(shape), OPERAND, None))
        return tuple(made)

    return tuple(run(stage_smem, factors_smem, adder))


def _operands_in_jnp(stage_smem: Any, factors_smem: Any, adder: jax.Array, step: int) -> tuple[jax.Array, ...]:
    words = stage_smem[pl.ds(step * STEP, STEP), :]
    of_codes = lax.bitcast_convert_type(words[:, : CODES // 4], jnp.float8_e4m3fn).reshape(STEP, TILES, TILE)
    factors = factors_smem[:, pl.ds(step * STEP, STEP)].T
    of_tail = lax.bitcast_convert_type(words[:, CODES // 4 :], jnp.float16).reshape(STEP, 1, TILE)
    every = jnp.concatenate([of_codes.astype(jnp.float16) * factors[..., None], of_tail], axis=1)
    mine = lax.dynamic_slice_in_dim(every.reshape(STEP, -1), adder * 4 * TILE, 4 * TILE, axis=1)
    by_operand = mine.reshape(STEP, 4, 8, OPERANDS, 2).transpose(3, 1, 4, 2, 0)  # operand, warp, half, lane, row
    return tuple(by_operand.reshape(OPERANDS, 64, STEP))


def _rows_of(thread: Thread, step: int) -> list[list[ir.Value]]:
    """Offsets of the rows that an adder's lane has of a step: [half of rows, neighbour]."""
    first, second = bit(thread.lane, 0), bit(thread.lane, 1)
    rows = []
    for neighbour in range(2):
        low = arith.addi(times(second, 2), arith.xori(first, constant(neighbour)))
        rows.append(times(arith.addi(low, constant(4 * neighbour)), ROW))
    return [[arith.addi(x, constant((STEP * step + 8 * half) * ROW)) for x in rows] for half in range(2)]


def _of_codes(stage: ir.Value, factors: ir.Value, thread: Thread, tile: ir.Value, step: int) -> list[ir.Value]:
    piece = arith.xori(arith.shrui(thread.group, constant(1)), times(bit(thread.lane, 1), 2))
    inside = arith.addi(times(piece, PIECE), times(bit(thread.group, 0), 8))
    start = arith.addi(arith.addi(stage, times(tile, TILE)), inside)
    pair = arith.addi(arith.addi(factors, times(tile, 2 * BLOCK)), times(thread.lane, 4))
    by_half = []
    for half, rows in enumerate(_rows_of(thread, step)):
        words = [words_at(arith.addi(start, row), 2) for row in rows]
        (factor,) = words_at(arith.addi(pair, constant(2 * (STEP * step + 8 * half))), 1)
        channels = []
        for first, second in zip(*words, strict=True):
            for order in ("0x5140", "0x7362"):
                channels += _float16(_permuted(first, second, order), factor)
        by_half.append(channels)
    return _in_order(by_half)


def _of_tail(stage: ir.Value, thread: Thread, step: int) -> list[ir.Value]:
    piece = arith.xori(thread.group, times(bit(thread.lane, 1), 2))
    start = arith.addi(arith.addi(stage, times(piece, PIECE)), constant(CODES))
    by_half = []
    for rows in _rows_of(thread, step):
        words = [words_at(arith.addi(start, row), 4) for row in rows]
        by_half.append([_permuted(*two, order) for two in zip(*words, strict=True) for order in ("0x5410", "0x7632")])
    return _in_order(by_half)


def _in_order(by_half: list[list[ir.Value]]) -> list[ir.Value]:
    """Of [half of rows, eight channels], as wgmma has them: [operand, half of rows, half of channels]."""
    return [by_half[half][2 * m + h] for m in range(OPERANDS) for half in range(2) for h in range(2)]


def _permuted(a: ir.Value, b: ir.Value, order: str) -> ir.Value:
    return llvm.inline_asm(i32(), [a, b], f"prmt.b32 $0, $1, $2, {order};", "=r,r,r")


def _float16(codes: ir.Value, factor: ir.Value) -> list[ir.Value]:
    """Four E4M3 codes as two pairs of float16, times a pair."""
    convert = (
        "{ .reg .b16 l, h; .reg .b32 x, y; mov.b32 {l, h}, $2; cvt.rn.f16x2.e4m3x2 x, l; cvt.rn.f16x2.e4m3x2 y, h; "
        "mul.rn.f16x2 $0, x, $3; mul.rn.f16x2 $1, y, $3; }"
    )
    kind = llvm.StructType.get_literal([i32()] * 2)
    found = llvm.inline_asm(kind, [codes, factor], convert, "=&r,=r,r,r")
    return [llvm.extractvalue(i32(), found, [i]) for i in range(2)]

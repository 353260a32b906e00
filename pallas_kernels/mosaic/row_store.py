"""Finished rows of 16 bits from an accumulator's registers to device memory, 16 bytes a thread.

An accumulator leaves a row's neighbours to four lanes, by twos. They trade: of four blocks of eight columns each lane
gets one, so that a warp stores 64 bytes of eight rows at once. Shared memory, where rows would wait for the copy before
them, is not touched, and nobody waits for the stores.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.mosaic.addresses import address_of, behind, constant, i32, times
from pallas_kernels.mosaic.interpreter import is_interpreted

COLUMNS = 32  # that four lanes trade at once
BYTES = 2  # of a number


def store(ref: Any, x: jax.Array) -> None:
    """ref [64, columns] in device memory, rows from multiples of 16 bytes on, becomes x, of 16 bits, in WGMMA's layout;
    columns are a multiple of COLUMNS.
    """
    assert x.shape[1] % COLUMNS == 0 and x.dtype.itemsize == BYTES, f"{x.dtype} [{x.shape}]"
    if is_interpreted():
        ref[...] = x
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def run(_ctx: Any, to: ir.Value, x: Any) -> None:
        pitch = BYTES * ir.MemRefType(to.type).get_strides_and_offset()[0][0]
        thread = arith.remui(utils.thread_idx(), constant(128))
        lane, warp = arith.remui(thread, constant(32)), arith.divui(thread, constant(32))
        place = arith.remui(lane, constant(4))
        row = arith.addi(arith.muli(warp, constant(16)), arith.divui(lane, constant(4)))
        start = arith.addi(address_of(to), arith.addi(times(row, pitch), times(place, 16)))
        odd, upper = (arith.cmpi(arith.CmpIPredicate.ne, arith.andi(place, constant(i)), constant(0)) for i in (1, 2))
        words = [llvm.bitcast(i32(), register) for register in x.registers.flat]  # of a block, of both rows
        for i in range(x.shape[1] // COLUMNS):
            for half in range(2):
                blocks = words[8 * i + half : 8 * (i + 1) : 2]
                pairs = [_traded(*blocks[j : j + 2], odd, 1) for j in (0, 2)]
                firsts, seconds = (_traded(*both, upper, 2) for both in zip(*pairs, strict=True))
                four = [firsts[0], seconds[0], firsts[1], seconds[1]]
                address = behind(start, 8 * half * pitch + BYTES * COLUMNS * i)
                text = "st.global.v4.b32 [$0], {$1, $2, $3, $4};"
                llvm.inline_asm(ir.Type.parse("!llvm.void"), [address, *four], text, "l,r,r,r,r", has_side_effects=True)

    run(ref, x)


def _traded(first: ir.Value, second: ir.Value, other: ir.Value, distance: int) -> tuple[ir.Value, ir.Value]:
    """`first` of both lanes where a lane is not the `other` one of two, else `second` of both; lower lanes' first."""
    kept, handed = arith.select(other, second, first), arith.select(other, first, second)
    found = utils.shfl_bfly(handed, distance)
    return arith.select(other, found, kept), arith.select(other, kept, found)

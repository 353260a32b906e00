"""wgmma's first operand, which is in registers, into shared memory as well: the same registers, by stmatrix.

Mosaic's own store takes matrices that lie side by side, which are not neighbours among an operand's registers: each of
them is copied before. For the interpreter, a plain store.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportAbstractUsage=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.mosaic.addresses import constant, i32, i64
from pallas_kernels.mosaic.interpreter import is_interpreted

ROWS, COLUMNS = 64, 64  # 128 bytes a row
SWIZZLED = plgpu.TilingTransform((8, COLUMNS)), plgpu.SwizzleTransform(128)


def store(ref: Any, x: jax.Array, begin: int) -> None:
    """Columns from `begin` on of ref [ROWS, COLUMNS], which is SWIZZLED, become x, of 16 bits, in WGMMA's layout."""
    if is_interpreted():
        ref[:, pl.ds(begin, x.shape[1])] = x
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(SWIZZLED), plgpu.Layout.WGMMA))
    def run(_ctx: Any, to: ir.Value, x: Any) -> None:
        strides, _ = ir.MemRefType(to.type).get_strides_and_offset()
        lane, warp = (
            arith.remui(i, constant(n)) for i, n in ((utils.thread_idx(), 32), (_div(utils.thread_idx(), 32), 4))
        )
        matrix, row = _div(lane, 8), arith.remui(lane, constant(8))
        # Matrices of eight rows and columns: lower rows first, then columns. This lane has the address of one row.
        block = arith.addi(arith.muli(warp, constant(2)), arith.remui(matrix, constant(2)))
        column = arith.xori(row, _div(matrix, 2))
        offset = arith.addi(arith.muli(block, constant(2 * strides[0])), arith.muli(row, constant(2 * COLUMNS)))
        start = arith.trunci(i32(), llvm.ptrtoint(i64(), utils.memref_ptr(to)))
        registers = x.registers.reshape(-1, 4)  # of two blocks of columns, each of two of rows
        for i, four in enumerate(registers, begin // 16):
            of_lane = arith.addi(offset, arith.muli(arith.xori(column, constant(2 * i)), constant(16)))
            words = [llvm.bitcast(i32(), register) for register in four]
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [arith.addi(start, of_lane), *words],
                "stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {$1, $2, $3, $4};",
                "r,r,r,r,r",
                has_side_effects=True,
            )

    run(ref, x)


def _div(x: ir.Value, divisor: int) -> ir.Value:
    return arith.divui(x, constant(divisor))

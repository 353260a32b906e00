"""What kernels do in terms of warps and lanes, where Pallas knows whole warpgroups: pieces of Mosaic."""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.mosaic.addresses import constant, i32

WARP, WARPS = 32, 4


def before(x: ir.Value) -> ir.Value:
    """The sum of int32 x of the lanes before each."""
    total = x
    for distance in (1, 2, 4, 8, 16):
        text = """{ .reg .pred p; .reg .b32 r; shfl.sync.up.b32 r|p, $1, $2, 0, 0xffffffff;
            @!p mov.b32 r, 0; add.u32 $0, $1, r; }"""
        total = llvm.inline_asm(i32(), [total, constant(distance)], text, "=r,r,r", has_side_effects=True)
    return arith.subi(total, x)


def sync_warp() -> None:
    llvm.inline_asm(None, [], "bar.warp.sync 0xffffffff;", "~{memory}", has_side_effects=True)


def thread() -> ir.Value:
    """Of the warpgroup."""
    return arith.remui(utils.thread_idx(), constant(WARPS * WARP))


def warp() -> ir.Value:
    """Of the warpgroup."""
    return arith.shrui(thread(), constant(5))


def lane() -> ir.Value:
    return arith.andi(utils.thread_idx(), constant(WARP - 1))


def element(ref: ir.Value, index: ir.Value) -> ir.Value:
    """Pointer to an element of four bytes."""
    return utils.getelementptr(utils.memref_ptr(ref), [index], i32())

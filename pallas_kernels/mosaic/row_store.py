"""Finished rows of 16 bits from an accumulator's registers to device memory, 16 bytes a thread.

An accumulator leaves a row's neighbours to four lanes, by twos. They trade: of four blocks of eight columns each lane
gets one, so that a warp stores 64 bytes of eight rows at once. Shared memory, where rows would wait for the copy before
them, is not touched, and nobody waits for the stores.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.mosaic.addresses import address_of, behind, constant, i32, times
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.warp import lane, warp

COLUMNS = 32  # that four lanes trade at once
BYTES = 2  # of a number
STORED = 16  # bytes, of a thread


def store(ref: Any, x: jax.Array) -> None:
    """ref [64, columns] in device memory becomes x, of 16 bits, in WGMMA's layout.

    Columns are a multiple of COLUMNS; rows of ref are a multiple of STORED bytes apart, the first column lies on one.
    """
    assert x.shape[1] % COLUMNS == 0 and x.dtype.itemsize == BYTES, f"{x.dtype} {x.shape}"
    if is_interpreted():
        ref[...] = x
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def run(_ctx: Any, to: ir.Value, x: Any) -> None:
        pitch = BYTES * ir.MemRefType(to.type).get_strides_and_offset()[0][0]
        assert pitch % STORED == 0, f"rows {pitch} bytes apart"
        place = arith.remui(lane(), constant(4))
        row = arith.addi(arith.muli(warp(), constant(16)), arith.divui(lane(), constant(4)))
        start = arith.addi(address_of(to), arith.addi(times(row, pitch), times(place, STORED)))
        odd, upper = (arith.cmpi(arith.CmpIPredicate.ne, arith.andi(place, constant(i)), constant(0)) for i in (1, 2))
        words = [llvm.bitcast(i32(), register) for register in x.registers.flat]  # of a block, of both rows
        for i in range(x.shape[1] // COLUMNS):
            for half in range(2):
                blocks = words[8 * i + half : 8 * (i + 1) : 2]
                four = traded(blocks, odd, upper, arith.select, utils.shfl_bfly)
                address = behind(start, 8 * half * pitch + BYTES * COLUMNS * i)
                llvm.inline_asm(
                    ir.Type.parse("!llvm.void"),
                    [address, *four],
                    "st.global.v4.b32 [$0], {$1, $2, $3, $4};",
                    "l,r,r,r,r,~{memory}",
                    has_side_effects=True,
                )

    run(ref, x)


def traded(
    blocks: Sequence[Any], odd: Any, upper: Any, select: Callable[..., Any], shuffle: Callable[[Any, int], Any]
) -> list[Any]:
    """A block's words of all four lanes, in order, where a lane had its own of four blocks: lane i gets block i.

    odd, upper: whether the lane's number among the four has its lower and its upper bit. shuffle(x, d): x of the lane
    whose number differs by the bit d.
    """

    def swapped(first: Any, second: Any, other: Any, distance: int) -> tuple[Any, Any]:
        """Both lanes' `first` where a lane is not the `other` one of two, else `second`; lower lanes' before upper."""
        kept, handed = select(other, second, first), select(other, first, second)
        found = shuffle(handed, distance)
        return select(other, found, kept), select(other, kept, found)

    pairs = [swapped(*blocks[i : i + 2], odd, 1) for i in (0, 2)]
    (first, third), (second, fourth) = (swapped(*both, upper, 2) for both in zip(*pairs, strict=True))
    return [first, second, third, fourth]

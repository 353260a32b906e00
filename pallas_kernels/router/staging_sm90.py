"""Rows of matrices on their way from device memory to registers, by shared memory, in Mosaic.

A warp copies rows as they lie, 16 bytes a lane, so that it touches as few lines as there can be. Where 16 bytes of a
row stand in shared memory depends on the row, so that threads that load different rows meet no bank twice. (With loads
in place of copies the compiler starts half of them when others have come.)
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

WARPS, WARP = 4, 32
ROWS = 8  # of a matrix that the threads of a warp have, four threads a row


class Thread(NamedTuple):
    """Where a thread stands: in its warpgroup, and in the fragments of matrix instructions."""

    number: ir.Value
    warp: ir.Value
    lane: ir.Value
    row: ir.Value  # of 8
    quad: ir.Value  # of the 4 threads of a row

    @classmethod
    def current(cls) -> Thread:
        number = arith.remui(utils.thread_idx(), word(WARPS * WARP))
        lane = arith.andi(number, word(WARP - 1))
        warp = arith.shrui(number, word(5))
        return cls(number, warp, lane, arith.shrui(lane, word(2)), arith.andi(lane, word(3)))


class Swap(NamedTuple):
    """16 bytes of row r stand where those of row 0 do whose number differs by exclusive or with (r % rows) * step."""

    rows: int
    step: int


class Staged:
    """`width` columns at a time of a matrix in device memory, from column `first` on."""

    def __init__(self, ref: ir.Value, first: ir.Value, width: int, swap: Swap, thread: Thread) -> None:
        kind = ir.MemRefType(ref.type)
        self.size = utils.bitwidth(kind.element_type) // 8  # bytes of an element
        self.stride = kind.get_strides_and_offset()[0][0] * self.size
        self.start = arith.addi(llvm.ptrtoint(_i64(), utils.memref_ptr(ref)), _wide(times(first, self.size)))
        self.thread, self.pitch = thread, width * self.size
        self.swap = swap if self.pitch >= 128 else Swap(1, 0)

    def _offset(self, row: ir.Value, byte: ir.Value) -> ir.Value:
        swapped = times(arith.andi(row, word(self.swap.rows - 1)), 16 * self.swap.step)
        return arith.addi(times(row, self.pitch), arith.xori(byte, swapped))

    @property
    def rows_of_copy(self) -> int:
        return min(WARP * 16 // self.pitch, ROWS)

    def copy(self, to: ir.Value, firsts: Sequence[ir.Value], exist: int, column: int) -> None:
        """Starts copies of `rows_of_copy` rows each from the rows `firsts` on, multiples of that; in place of rows
        that do not exist come copies of the last."""
        pieces = self.pitch // 16
        row = arith.andi(arith.divui(self.thread.lane, word(pieces)), word(self.rows_of_copy - 1))
        byte = times(arith.remui(self.thread.lane, word(pieces)), 16)
        start = arith.addi(self.start, _wide(arith.addi(byte, word(column * self.size))))
        for first in firsts:
            at = arith.addi(row, first)
            source = arith.muli(_wide(arith.minui(at, word(exist - 1))), arith.constant(_i64(), self.stride))
            addresses = arith.addi(to, self._offset(at, byte)), arith.addi(start, source)
            ptx("cp.async.cg.shared.global [$0], [$1], 16;", *addresses)

    def load(self, at: ir.Value, row: ir.Value, byte: ir.Value, words: int) -> list[ir.Value]:
        """Words of what was copied to `at`."""
        address = arith.addi(at, self._offset(row, byte))
        if words == 1:
            return [llvm.inline_asm(i32(), [address], "ld.shared.b32 $0, [$1];", "=r,r", has_side_effects=True)]
        outputs = ", ".join(f"${i}" for i in range(words))
        kind = llvm.StructType.get_literal([i32()] * words)
        load = f"ld.shared.v{words}.b32 {{{outputs}}}, [${words}];"
        found = llvm.inline_asm(kind, [address], load, ",".join(["=r"] * words + ["r"]), has_side_effects=True)
        return [llvm.extractvalue(i32(), found, [i]) for i in range(words)]


def start_of(smem: ir.Value) -> ir.Value:
    return llvm.ptrtoint(i32(), utils.memref_ptr(smem))


def terms_of(four: list[ir.Value]) -> list[list[ir.Value]]:
    """The three bfloat16 terms of four float32 numbers, given as words: two pairs each.

    The upper 16 bits of a number, those of what they leave, and the rest: their sum is the number.
    """
    found = []
    for term in range(3):
        found.append(
            [llvm.inline_asm(i32(), pair, "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r") for pair in (four[:2], four[2:])]
        )
        if term < 2:
            four = [_without_upper(x) for x in four]
    return found


def _without_upper(x: ir.Value) -> ir.Value:
    float32 = ir.F32Type.get()
    upper = arith.bitcast(float32, arith.andi(x, word(-(2**16))))
    return arith.bitcast(i32(), arith.subf(arith.bitcast(float32, x), upper))


def ptx(text: str, *args: ir.Value) -> None:
    kinds = ["l" if x.type == _i64() else "r" for x in args]
    llvm.inline_asm(None, list(args), text, ",".join([*kinds, "~{memory}"]), has_side_effects=True)


def word(value: int) -> ir.Value:
    return utils.c(value, i32())


def times(x: ir.Value, factor: int) -> ir.Value:
    return arith.muli(x, word(factor))


def i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _wide(x: ir.Value) -> ir.Value:
    return arith.extui(_i64(), x)


def _i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)

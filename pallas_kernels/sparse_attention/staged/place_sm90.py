"""Where bytes of staged entries lie in shared memory, and who reads them, on Hopper.

A block is BLOCK rows of ROW bytes: 7 tiles of 64 codes, then 64 bfloat16 channels, in pieces of 16 bytes. Two kinds of
readers meet no bank twice:

- scorers have a row in four lanes, a piece of every tile each (stage_sm90.py);
- adders have channels as rows: of sixteen entries a lane takes four, eight channels of each (operands_sm90.py).

To that end row 16 s + 8 h + g lies at `place`, and piece p of what lies there at p ^ 2 b, where b is the second bit of
the place.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.mosaic.addresses import constant, i32
from pallas_kernels.sparse_attention.held_sm90 import LANES, TILE
from pallas_kernels.sparse_attention.many.gather_sm90 import ROWS

BLOCK = ROWS
CODES, TAIL = 448, 128  # bytes of a row
ROW = CODES + TAIL
TILES = TAIL_TILE = CODES // TILE
PIECE = 16


class Thread:
    """Where a thread stands in its warpgroup: its warp, its row of eight, and its place in the four lanes of a row."""

    def __init__(self) -> None:
        number = arith.andi(utils.thread_idx(), constant(127))
        self.warp = arith.shrui(number, constant(5))
        self.group = arith.andi(arith.shrui(number, constant(2)), constant(7))
        self.lane = arith.andi(number, constant(LANES - 1))

    def place(self, half: int) -> ir.Value:
        """Where row 16 warp + 8 half + group lies: the last three bits are g's first, its third, and both lower ones'
        exclusive or."""
        first, second, third = (bit(self.group, i) for i in range(3))
        low = arith.addi(times(first, 4), arith.addi(times(third, 2), arith.xori(first, second)))
        return arith.addi(times(self.warp, 16), arith.addi(low, constant(8 * half)))

    def piece_of_row(self, start: ir.Value, half: int, first: int) -> ir.Value:
        """The address of this lane's piece of the four from `first` on, of its row."""
        row = arith.addi(start, times(self.place(half), ROW))
        piece = arith.xori(self.lane, times(bit(self.group, 2), 2))
        return arith.addi(row, arith.addi(times(piece, PIECE), constant(first * PIECE)))


def words_at(address: ir.Value, count: int) -> list[ir.Value]:
    """Words from shared memory."""
    outputs = ", ".join(f"${i}" for i in range(count))
    target = f".v{count}.b32 {{{outputs}}}" if count > 1 else ".b32 $0"
    kind = llvm.StructType.get_literal([i32()] * count) if count > 1 else i32()
    constraints = ",".join(["=r"] * count + ["r"])
    found = llvm.inline_asm(kind, [address], f"ld.shared{target}, [${count}];", constraints, has_side_effects=True)
    return [llvm.extractvalue(i32(), found, [i]) for i in range(count)] if count > 1 else [found]


def place_of(smem: ir.Value) -> ir.Value:
    return llvm.ptrtoint(i32(), utils.memref_ptr(smem))


def bit(x: ir.Value, i: int) -> ir.Value:
    return arith.andi(arith.shrui(x, constant(i)), constant(1))


def times(x: ir.Value, factor: int) -> ir.Value:
    return arith.muli(x, constant(factor))

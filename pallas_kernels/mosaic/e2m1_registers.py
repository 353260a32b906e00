"""The parts of e2m1_folded.py and e2m1_apart.py that Pallas has no words for, in Mosaic: registers, and a vote.

A thread has of 64 rows two, 8 apart: of codes a word of every row and group, and of scales those of one block.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

BLOCK, GROUP = 128, 32  # columns that share a scale of the product, and of the weight
GROUPS = BLOCK // GROUP
ROWS = 64  # of one wgmma
BLOCKS = 4  # of a row, whose weight scales are the 16 bytes that a copy has at least
SPREAD = 11  # how many powers of two below the largest scale a group's may be: 0.5 becomes 2^-6, no subnormal
CODES = plgpu.Layout.WGMMA_8BIT
EACH_ROW = plgpu.Layout.WGMMA.reduce(1)  # of a vector with one element a row of an accumulator
# Of what there is for every row and block: a warp has the same 16 rows as of an accumulator, a thread one block.
EACH_BLOCK = plgpu.Layout.TILED(plgpu.Tiling(((64, 4), (16, 4), (8, 4), (1,))), (-7,), (-3, -2), -1)
# wgmma's descriptor of an operand counts 16 bytes. Its lower half is an address (and a stride that a swizzle ignores);
# its upper half the stride between eights of rows, and this: swizzled by 128 bytes, from a multiple of 1024 on. Within
# a swizzled row, a K step of 32 columns begins 32 bytes further on.
_UNIT, _SWIZZLED = 16, 1 << 30
WORD = 4  # bytes: eight packed codes, or four E4M3 ones, or the scales of a block
# Of a word shifted left by 4 and the word itself, the bytes whose top bits are the signs of four codes.
_SIGNS = 0x5140, 0x7362


def look_up(block: int, _ctx: Any, packed: mgpu.FragmentedArray, *flat: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    one_word = _words(1)
    four_codes = ir.VectorType.get((4,), ir.Float8E4M3FNType.get())
    # The second axis of registers counts 16 bytes, the fifth the rows that a thread has, 8 apart.
    words = packed.registers[:, block * GROUPS : (block + 1) * GROUPS]
    codes = np.empty((1, 2 * GROUPS, *words.shape[2:]), dtype=object)
    for (_, group, _, _, row, *_), word in np.ndenumerate(words):
        low, high = (vector.extract(flat[2 * group + i].registers.flat[row], [], [0]) for i in (0, 1))
        value = vector.extract(vector.bitcast(one_word, word), [], [0])
        for half, four in enumerate(of_word(value, low, high)):
            codes[0, 2 * group + half, 0, 0, row] = vector.bitcast(four_codes, vector.broadcast(one_word, four))
    return mgpu.FragmentedArray(_registers=codes, _layout=CODES.to_mgpu(), _is_signed=None)


def of_word(word: ir.Value, low: ir.Value, high: ir.Value) -> list[ir.Value]:
    """The E4M3 bytes of the first four of a word's E2M1 codes, and of the others, by a table of magnitudes."""
    magnitudes = arith.andi(word, _constant(0x77777777))
    signs = arith.shli(word, _constant(4))
    found = []
    for half, order in enumerate(_SIGNS):
        picked = arith.shrui(magnitudes, _constant(16)) if half else magnitudes
        sign = arith.andi(_permuted(signs, word, _constant(order)), _constant(0x80808080))
        found.append(arith.ori(_permuted(low, high, picked), sign))
    return found


def _permuted(low: ir.Value, high: ir.Value, order: ir.Value) -> ir.Value:
    """The bytes of two words that the lowest four nibbles of `order` number."""
    return llvm.inline_asm(_word(), [low, high, order], "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r")


def store_halves(_ctx: Any, codes_gmem: ir.Value, codes: mgpu.FragmentedArray) -> None:
    for value, row, word in _four_neighbours(codes, _row_stride(codes_gmem)):
        # Word w of the eight of a group of 32 columns becomes word w / 2, in the second half if w is odd.
        inside = arith.addi(arith.shrui(_masked(word, 7), _constant(1)), arith.shli(_masked(word, 1), _constant(2)))
        byte = arith.addi(arith.shli(_masked(word, ~7), _constant(2)), arith.shli(inside, _constant(2)))
        llvm.store(vector.broadcast(_words(1), value), _address(codes_gmem, arith.addi(row, byte)), alignment=WORD)


def store_evens(_ctx: Any, codes_gmem: ir.Value, codes: mgpu.FragmentedArray) -> None:
    put_evens(codes_gmem, codes, _row_stride(codes_gmem))


def put_evens(ref: ir.Value, codes: mgpu.FragmentedArray, stride: int) -> None:
    """Rows of codes [G, 128] `stride` bytes apart, the even ones of every 32 columns in front."""
    half = ir.IntegerType.get_signless(16)
    for value, row, word in _four_neighbours(codes, stride):
        # Columns 4w to 4w + 3 of a group of 32 become bytes 2w and 2w + 1 of its first half, and of its second.
        byte = arith.addi(arith.shli(_masked(word, ~7), _constant(2)), arith.shli(_masked(word, 7), _constant(1)))
        apart = _permuted(value, value, _constant(0x3120))  # the even ones in the lower half
        for odd in range(2):
            found = arith.trunci(half, arith.shrui(apart, _constant(16 * odd)))
            place = arith.addi(row, arith.addi(byte, _constant(GROUP // 2 * odd)))
            llvm.store(vector.broadcast(ir.VectorType.get((1,), half), found), _address(ref, place), alignment=2)


def put_words(ref: ir.Value, codes: mgpu.FragmentedArray, stride: int) -> None:
    """Rows of codes [G, 128] `stride` bytes apart, as they are."""
    for value, row, word in _four_neighbours(codes, stride):
        place = arith.addi(row, arith.shli(word, _constant(2)))
        llvm.store(vector.broadcast(_words(1), value), _address(ref, place), alignment=WORD)


def _four_neighbours(codes: mgpu.FragmentedArray, stride: int) -> Iterator[tuple[ir.Value, ir.Value, ir.Value]]:
    """Every word of four codes that a thread has, the first byte of its row, and which word of the row it is."""
    starts = codes.layout.thread_idxs(codes.shape)
    for register, (group, column) in zip(codes.registers.flat, starts, strict=True):
        words = ir.VectorType(register.type).shape[0] // WORD
        values = vector.bitcast(_words(words), register)
        row, first = _at((group, stride)), arith.shrui(arith.index_cast(_word(), column), _constant(2))
        for i in range(words):
            yield vector.extract(values, [], [i]), row, arith.addi(first, _constant(i))


def _row_stride(codes_gmem: ir.Value) -> int:
    return ir.MemRefType(codes_gmem.type).get_strides_and_offset()[0][0]


def spread(block: int, magnitude: int, sign: int, _ctx: Any, packed: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    one_word = _words(1)
    of_magnitude, of_sign = (_constant(bits * 0x01010101) for bits in (magnitude, sign))
    four_codes = ir.VectorType.get((4,), ir.Float8E4M3FNType.get())
    words = packed.registers[:, block * GROUPS : (block + 1) * GROUPS]
    codes = np.empty((1, 2 * GROUPS, *words.shape[2:]), dtype=object)
    for (_, group, _, _, row, *_), word in np.ndenumerate(words):
        value = vector.extract(vector.bitcast(one_word, word), [], [0])
        evens = arith.shli(value, _constant(2)), arith.shli(value, _constant(4))
        odds = arith.shrui(value, _constant(2)), value
        for half, (magnitudes, signs) in enumerate((evens, odds)):
            four = arith.ori(arith.andi(magnitudes, of_magnitude), arith.andi(signs, of_sign))
            codes[0, 2 * group + half, 0, 0, row] = vector.bitcast(four_codes, vector.broadcast(one_word, four))
    return mgpu.FragmentedArray(_registers=codes, _layout=CODES.to_mgpu(), _is_signed=None)


def multiply_groups(_ctx: Any, codes: mgpu.FragmentedArray, other: ir.Value) -> tuple[mgpu.FragmentedArray, ...]:
    """A wgmma for each 32 columns, into accumulators of its own, which ignore what they find.

    The registers of codes and products are the tensor core's until they are waited for.
    """
    layout, real = fragmented_array.WGMMA_LAYOUT_ACC_32BIT, ir.F32Type.get()
    tiles, _, tile, _ = ir.MemRefType(other.type).shape
    apart = ir.MemRefType(other.type).get_strides_and_offset()[0][0]  # bytes between eights of rows
    upper, n = _SWIZZLED | apart // _UNIT, tiles * tile
    count = n // 2  # registers of a product
    a_first, b_at = GROUPS * count, GROUPS * (count + 4)
    lines = ["{ .reg .b64 b; .reg .b32 start; .reg .pred p;", "setp.ne.b32 p, 0, 0;", "wgmma.fence.sync.aligned;"]
    for group in range(GROUPS):
        sums, a = (
            ", ".join(f"${first + i}" for i in range(size))
            for first, size in ((group * count, count), (a_first + 4 * group, 4))
        )
        lines += [f"add.u32 start, ${b_at}, {group * GROUP // _UNIT};", f"mov.b64 b, {{start, {upper}}};"]
        lines += [f"wgmma.mma_async.sync.aligned.m64n{n}k32.f32.e4m3.e4m3 {{{sums}}}, {{{a}}}, b, p, 1, 1;"]
    lines += ["wgmma.commit_group.sync.aligned; }"]
    held = [
        vector.extract(vector.bitcast(_words(1), register), [], [0])
        for group in range(GROUPS)
        for register in codes[:, group * GROUP : (group + 1) * GROUP].registers.flat
    ]
    address = arith.trunci(_word(), llvm.ptrtoint(ir.IntegerType.get_signless(64), utils.memref_ptr(other)))
    found = llvm.inline_asm(
        llvm.StructType.get_literal([real] * (GROUPS * count)),
        [*held, arith.divui(address, _constant(_UNIT))],
        "\n".join(lines),
        ",".join(["=f"] * (GROUPS * count) + ["r"] * (4 * GROUPS + 1)),
        has_side_effects=True,
    )
    products = []
    for group in range(GROUPS):
        registers = np.empty(layout.registers_shape((ROWS, n)), dtype=object)
        for i, at in enumerate(np.ndindex(*registers.shape)):
            value = llvm.extractvalue(real, found, [group * count + i])
            registers[at] = vector.from_elements(ir.VectorType.get((1,), real), [value])
        product = mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
        products.append(product.to_layout(fragmented_array.WGMMA_LAYOUT))
    return tuple(products)


def store_scales(_ctx: Any, tables_smem: ir.Value, *bits: mgpu.FragmentedArray) -> None:
    utils.warp_barrier()  # what was there has been read: rows of a warp are its own
    stride, layout = _row_bytes(tables_smem), EACH_BLOCK.to_mgpu()
    starts = layout.thread_idxs((ROWS, BLOCKS))
    for at, (row, block) in zip(np.ndindex(*bits[0].registers.shape), starts, strict=True):
        four = vector.from_elements(_words(4), [vector.extract(x.registers[at], [], [0]) for x in bits])
        llvm.store(four, _address(tables_smem, _at((row, stride), (block, GROUPS * WORD))), alignment=16)
    utils.warp_barrier()


def load_scales(_ctx: Any, of_block: ir.Value) -> tuple[mgpu.FragmentedArray, ...]:
    stride, layout = _row_bytes(of_block), EACH_ROW.to_mgpu()
    found = np.empty((GROUPS, *layout.registers_shape((ROWS,))), dtype=object)
    for at, (row,) in zip(np.ndindex(*found.shape[1:]), layout.thread_idxs((ROWS,)), strict=True):
        loaded = llvm.load(_words(GROUPS), _address(of_block, _at((row, stride))), alignment=16)
        for group in range(GROUPS):
            found[group, *at] = vector.broadcast(_words(1), vector.extract(loaded, [], [group]))
    return tuple(mgpu.FragmentedArray(_registers=x, _layout=layout, _is_signed=True) for x in found)


def _row_bytes(words_smem: ir.Value) -> int:
    return ir.MemRefType(words_smem.type).get_strides_and_offset()[0][0] * WORD


def _masked(word: ir.Value, bits: int) -> ir.Value:
    return arith.andi(word, utils.c(bits, _word()))


def any_beyond(_ctx: Any, spreads: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    widest, *others = (
        vector.extract(register, [], [i]) for register in spreads.registers.flat for i in range(register.type.shape[0])
    )
    for other in others:
        widest = arith.maxsi(widest, other)
    ptx = f"""{{ .reg .pred here, anywhere;
        setp.gt.s32 here, $1, {SPREAD};
        barrier.cta.red.or.pred anywhere, $2, {utils.WARPGROUP_SIZE}, here;
        selp.b32 $0, 1, 0, anywhere; }}"""
    args = [widest, utils.warpgroup_barrier_idx(sync=False)]
    answer = llvm.inline_asm(_word(), args, ptx, "=r,r,r", has_side_effects=True)
    return mgpu.FragmentedArray.splat(answer, (), is_signed=True)


def load_words(_ctx: Any, scale_smem: ir.Value) -> mgpu.FragmentedArray:
    layout = EACH_BLOCK.to_mgpu()
    registers = np.empty(layout.registers_shape((ROWS, BLOCKS)), dtype=object)
    for at, (row, block) in zip(np.ndindex(*registers.shape), layout.thread_idxs((ROWS, BLOCKS)), strict=True):
        start = _at((row, BLOCKS * WORD), (block, WORD))
        registers[at] = llvm.load(_words(1), _address(scale_smem, start), alignment=WORD)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)


def store_tables(_ctx: Any, tables_smem: ir.Value, *flat: mgpu.FragmentedArray) -> None:
    *tables, bits = flat
    utils.warp_barrier()  # what was there has been read: rows of a warp are its own
    stride, layout = _row_bytes(tables_smem), EACH_BLOCK.to_mgpu()
    for at, (row, block) in zip(np.ndindex(*bits.registers.shape), layout.thread_idxs((ROWS, BLOCKS)), strict=True):
        values = [vector.extract(x.registers[at], [], [0]) for x in tables]
        for first in range(0, 2 * GROUPS, 4):
            start = _at((row, stride), (block, 2 * GROUPS * WORD), first * WORD)
            four = vector.from_elements(_words(4), values[first : first + 4])
            llvm.store(four, _address(tables_smem, start), alignment=16)
        start = _at((row, stride), (block, WORD), 2 * GROUPS * BLOCKS * WORD)
        llvm.store(bits.registers[at], _address(tables_smem, start), alignment=WORD)
    utils.warp_barrier()


def load_tables(_ctx: Any, of_block: ir.Value, scales: ir.Value) -> tuple[mgpu.FragmentedArray, ...]:
    stride, layout = _row_bytes(of_block), EACH_ROW.to_mgpu()
    found = np.empty((2 * GROUPS + 1, *layout.registers_shape((ROWS,))), dtype=object)
    for at, (row,) in zip(np.ndindex(*found.shape[1:]), layout.thread_idxs((ROWS,)), strict=True):
        words = []
        for smem, first, count in ((of_block, 0, 4), (of_block, 4, 4), (scales, 0, 1)):
            start = _at((row, stride), first * WORD)
            loaded = llvm.load(_words(count), _address(smem, start), alignment=count * WORD)
            words += [vector.extract(loaded, [], [i]) for i in range(count)]
        for i, word in enumerate(words):
            found[i, *at] = vector.broadcast(_words(1), word)
    return tuple(mgpu.FragmentedArray(_registers=x, _layout=layout, _is_signed=True) for x in found)


def _at(*parts: tuple[ir.Value, int] | int) -> ir.Value:
    """The sum of these: indices times what they count, or numbers."""
    terms = [
        _constant(part) if isinstance(part, int) else arith.muli(arith.index_cast(_word(), part[0]), _constant(part[1]))
        for part in parts
    ]
    return functools.reduce(arith.addi, terms)


def _address(smem: ir.Value, byte: ir.Value) -> ir.Value:
    return utils.getelementptr(utils.memref_ptr(smem), [byte], ir.IntegerType.get_signless(8))


def _word() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _words(count: int) -> ir.Type:
    return ir.VectorType.get((count,), _word())


def _constant(bits: int) -> ir.Value:
    """A word with these bits; Mosaic takes signed numbers."""
    return utils.c(bits - (bits >> 31 << 32), _word())

"""Products of few bfloat16 tokens and a matrix in float32's precision, by a warpgroup and from registers alone.

float32 is the exact sum of three bfloat16 terms: the upper 16 bits, those of what they leave, and the rest. A thread
loads 16 bytes of the matrix, cuts its four numbers into terms with byte permutations and subtractions, and multiplies
each term by tokens, whose registers come from device memory too (mma.sync, float32 sums). A sum over columns does not
care in which order they come: a thread's four neighbours stand where the instruction wants columns 2t, 2t + 1, 2t + 8
and 2t + 9. The four warps have columns of their own; every term has an accumulator of its own where there are few, so
that products need not wait for one another. The interpreter's twin is a matrix product.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.router.words_sm90 import lanes

WARPS, WARP = 4, 32
TOKENS, EXPERTS, STEP = 16, 8, 16  # of one instruction: rows, columns, and what it sums over
ROWS = 8  # of which a thread has one, and of the tokens another one
MOST_COLUMNS = 64  # that a warp copies at a time
BUSY = 8  # accumulators that keep the tensor cores busy


def scratch_words(tokens: int, columns: int, experts: int, weight_bytes: int) -> int:
    """Of shared memory that `products` takes: for what is on its way, and then for the warps' sums."""
    rows = -(-tokens // ROWS) * ROWS
    return max(columns * (experts * weight_bytes + rows * 2) // 4, WARPS * rows * experts)


def products(x_gmem: Any, weight_gmem: Any, sums_smem: Any) -> jax.Array:
    """x @ weight.T of bfloat16 x [n, columns] and float32 or bfloat16 weight [experts, columns], flat, in `lanes`.

    Rows behind n, up to the next multiple of 8, are there too and are not defined. sums_smem: float32 [scratch_words].
    """
    (tokens, columns), experts = x_gmem.shape, weight_gmem.shape[0]
    size = -(-tokens // ROWS) * ROWS * experts
    if is_interpreted():
        x, weight = (ref[...].astype(jnp.float32) for ref in (x_gmem, weight_gmem))
        found = jnp.dot(x, weight.T, precision="highest").reshape(-1)
        return jnp.pad(found, (0, size - len(found)))
    layout = lanes(size)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((size,), jnp.dtype(jnp.float32), layout=layout),
    )
    def run(_ctx: Any, x: ir.Value, weight: ir.Value, sums: ir.Value) -> Any:
        thread = _Thread.current()
        products = _products(x, weight, utils.memref_ptr(sums), thread, tokens, columns, experts)
        flat = _over_warps(products, utils.memref_ptr(sums), thread, experts, size)
        registers = np.empty(layout.to_mgpu().registers_shape((size,)), dtype=object)
        one = ir.VectorType.get((1,), ir.F32Type.get())
        registers.flat = [vector.broadcast(one, x) for x in flat]
        return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None)

    return run(x_gmem, weight_gmem, sums_smem)


class _Thread(NamedTuple):
    """Where a thread stands: in its warpgroup, and in the fragments of mma.sync."""

    number: ir.Value
    warp: ir.Value
    lane: ir.Value
    row: ir.Value  # 8 of them; the other half of an instruction's tokens is 8 further down
    quad: ir.Value  # 4 of them, which share a row

    @classmethod
    def current(cls) -> _Thread:
        number = arith.remui(utils.thread_idx(), _word(WARPS * WARP))
        lane = arith.andi(number, _word(WARP - 1))
        warp = arith.shrui(number, _word(5))
        return cls(number, warp, lane, arith.shrui(lane, _word(2)), arith.andi(lane, _word(3)))


def _products(
    x: ir.Value, weight: ir.Value, smem: ir.Value, thread: _Thread, tokens: int, columns: int, experts: int
) -> dict[tuple[int, int], list[ir.Value]]:
    """Of a warp's columns: four sums for every tile of 16 tokens and every 8 experts."""
    own = columns // WARPS
    width = math.gcd(own, MOST_COLUMNS)
    of_x, of_weight = (_Matrix(ref, _times(thread.warp, own), width, thread) for ref in (x, weight))
    rows = -(-tokens // ROWS) * ROWS
    size = own * (experts * of_weight.size + rows * of_x.size)
    stage = arith.addi(llvm.ptrtoint(_i32(), smem), _times(thread.warp, size))
    staged = []
    for begin in range(0, own, width):
        of_weight.copy(stage, experts, experts, begin)
        to_x = arith.addi(stage, _word(experts * width * of_weight.size))
        of_x.copy(to_x, rows, tokens, begin)
        _ptx("cp.async.commit_group;")
        staged.append((stage, to_x))
        stage = arith.addi(to_x, _word(rows * width * of_x.size))
    tiles, pieces = -(-tokens // TOKENS), experts // EXPERTS
    terms = 3 if of_weight.size == 4 else 1
    separate = tiles * pieces < BUSY
    sums: dict[tuple[int, int, int], list[ir.Value]] = {}
    for turn, (weight_at, x_at) in enumerate(staged):
        _ptx(f"cp.async.wait_group {len(staged) - 1 - turn};")
        utils.warp_barrier()
        for step in range(width // STEP):
            of_experts = [of_weight.load(weight_at, EXPERTS * j, step) for j in range(pieces)]
            cut = [_terms(four) if terms == 3 else [four] for four in of_experts]
            for i in range(tiles):
                # Where none of the upper rows is a token's there is nothing.
                low, high = (
                    of_x.load(x_at, begin, step) if begin < rows else [_word(0)] * 2
                    for begin in (TOKENS * i, TOKENS * i + ROWS)
                )
                a = [low[0], high[0], low[1], high[1]]
                for term, j in itertools.product(reversed(range(terms)), range(pieces)):  # small ones first
                    at = i, j, term if separate else 0
                    sums[at] = _mma(sums.get(at), a, cut[j][term])

    def total(i: int, j: int) -> list[ir.Value]:
        small_first = [sums[i, j, term] for term in reversed(range(terms)) if (i, j, term) in sums]
        return functools.reduce(lambda a, b: [arith.addf(*both) for both in zip(a, b, strict=True)], small_first)

    return {(i, j): total(i, j) for i, j in itertools.product(range(tiles), range(pieces))}


def _over_warps(
    products: dict[tuple[int, int], list[ir.Value]], smem: ir.Value, thread: _Thread, experts: int, size: int
) -> list[ir.Value]:
    """What a thread has of the sums over the warps, flat: elements `number`, `number` + 128 .."""
    utils.warpgroup_barrier()  # all have read what was on its way
    pair = ir.VectorType.get((2,), ir.F32Type.get())
    start = arith.addi(_times(thread.warp, size), arith.addi(_times(thread.row, experts), _times(thread.quad, 2)))
    for (i, j), four in products.items():
        for half in range(2):
            offset = (TOKENS * i + ROWS * half) * experts + EXPERTS * j
            if offset < size:
                address = utils.getelementptr(smem, [arith.addi(start, _word(offset))], ir.F32Type.get())
                llvm.store(vector.from_elements(pair, four[2 * half : 2 * half + 2]), address, alignment=8)
    utils.warpgroup_barrier()
    flat = []
    for first in range(0, size, WARPS * WARP):
        found = []
        for warp in range(WARPS):
            at = arith.addi(thread.number, _word(warp * size + first))
            address = utils.getelementptr(smem, [at], ir.F32Type.get())
            found.append(llvm.load(ir.F32Type.get(), address, alignment=4))
        flat.append(functools.reduce(arith.addf, found))
    utils.warpgroup_barrier()  # the memory may be written again
    return flat


class _Matrix:
    """Rows of a matrix, of which a warp has columns from `first` on, `width` at a time by way of shared memory.

    A warp copies rows as they lie, 16 bytes a lane, so that it touches as few lines as there can be. Where 16 bytes of
    a row stand in shared memory depends on the row, so that threads that load different rows meet no bank twice.
    """

    def __init__(self, ref: ir.Value, first: ir.Value, width: int, thread: _Thread) -> None:
        kind = ir.MemRefType(ref.type)
        self.size = utils.bitwidth(kind.element_type) // 8
        self.stride = kind.get_strides_and_offset()[0][0] * self.size
        self.start = arith.addi(llvm.ptrtoint(_i64(), utils.memref_ptr(ref)), _wide(_times(first, self.size)))
        self.thread, self.pitch = thread, width * self.size

    def _swapped(self, row: ir.Value) -> ir.Value:
        """What to change in the byte of a row in shared memory."""
        if self.pitch < 128:
            return _word(0)
        rows = 8 // self.size  # that are loaded at once, by this many threads of four elements each
        return _times(arith.andi(row, _word(rows - 1)), 16 * self.size)

    def copy(self, to: ir.Value, rows: int, exist: int, column: int) -> None:
        """Starts copies of `rows` rows; in place of those that do not exist come copies of the last."""
        pieces = self.pitch // 16
        each = min(WARP // pieces, ROWS)
        row = arith.andi(arith.divui(self.thread.lane, _word(pieces)), _word(each - 1))
        byte = _times(arith.remui(self.thread.lane, _word(pieces)), 16)
        to = arith.addi(to, arith.addi(_times(row, self.pitch), arith.xori(byte, self._swapped(row))))
        start = arith.addi(self.start, _wide(arith.addi(byte, _word(column * self.size))))
        for first in range(0, rows, each):
            at = arith.addi(row, _word(first))
            if first + each > exist:
                at = arith.minui(at, _word(exist - 1))
            address = arith.addi(start, arith.muli(_wide(at), arith.constant(_i64(), self.stride)))
            _ptx("cp.async.cg.shared.global [$0], [$1], 16;", arith.addi(to, _word(first * self.pitch)), address)

    def load(self, at: ir.Value, first: int, step: int) -> list[ir.Value]:
        """Four neighbours of the thread's row behind `first`, as `size` words."""
        byte = arith.addi(_times(self.thread.quad, 4 * self.size), _word(STEP * self.size * step))
        byte = arith.xori(byte, self._swapped(self.thread.row))
        row = arith.addi(_times(self.thread.row, self.pitch), _word(first * self.pitch))
        outputs = ", ".join(f"${i}" for i in range(self.size))
        kind = llvm.StructType.get_literal([_i32()] * self.size)
        constraints = ",".join(["=r"] * self.size + ["r"])
        ptx = f"ld.shared.v{self.size}.b32 {{{outputs}}}, [${self.size}];"
        address = arith.addi(at, arith.addi(row, byte))
        found = llvm.inline_asm(kind, [address], ptx, constraints, has_side_effects=True)
        return [llvm.extractvalue(_i32(), found, [i]) for i in range(self.size)]


def _ptx(ptx: str, *args: ir.Value) -> None:
    kinds = ["l" if x.type == _i64() else "r" for x in args]
    llvm.inline_asm(None, list(args), ptx, ",".join([*kinds, "~{memory}"]), has_side_effects=True)


def _terms(four: list[ir.Value]) -> list[list[ir.Value]]:
    """The three bfloat16 terms of four float32 numbers, given as words: two pairs each."""
    found, float32, word = [], ir.F32Type.get(), ir.IntegerType.get_signless(32)
    for term in range(3):
        pairs = []
        for low, high in (four[:2], four[2:]):
            pairs.append(llvm.inline_asm(word, [low, high], "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r"))
        found.append(pairs)
        if term < 2:
            upper = [arith.andi(x, _word(-(2**16))) for x in four]
            rest = [
                arith.subf(arith.bitcast(float32, x), arith.bitcast(float32, u))
                for x, u in zip(four, upper, strict=True)
            ]
            four = [arith.bitcast(word, x) for x in rest]
    return found


def _mma(sums: list[ir.Value] | None, a: list[ir.Value], b: list[ir.Value]) -> list[ir.Value]:
    ptx = """mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"""
    float32 = ir.F32Type.get()
    if sums is None:
        sums = [arith.constant(float32, 0.0)] * 4
    kind = llvm.StructType.get_literal([float32] * 4)
    found = llvm.inline_asm(kind, [*a, *b, *sums], ptx, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f")
    return [llvm.extractvalue(float32, found, [i]) for i in range(4)]


def _word(value: int) -> ir.Value:
    return utils.c(value, _i32())


def _wide(x: ir.Value) -> ir.Value:
    return arith.extui(_i64(), x)


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def _times(x: ir.Value, factor: int) -> ir.Value:
    return arith.muli(x, _word(factor))

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

WARPS = 4
TOKENS, EXPERTS, STEP = 16, 8, 16  # of one instruction: rows, columns, and what it sums over
ROWS = 8  # of which a thread has one, and of the tokens another one
STEPS = WARPS * STEP  # columns that the warpgroup multiplies at a time
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
    row: ir.Value  # 8 of them; the other half of an instruction's tokens is 8 further down
    quad: ir.Value  # 4 of them, which share a row

    @classmethod
    def current(cls) -> _Thread:
        number = arith.remui(utils.thread_idx(), _word(WARPS * 32))
        lane = arith.andi(number, _word(31))
        warp = arith.shrui(number, _word(5))
        return cls(number, warp, arith.shrui(lane, _word(2)), arith.andi(lane, _word(3)))


def _products(
    x: ir.Value, weight: ir.Value, smem: ir.Value, thread: _Thread, tokens: int, columns: int, experts: int
) -> dict[tuple[int, int], list[ir.Value]]:
    """Of a warp's columns: four sums for every tile of 16 tokens and every 8 experts."""
    first = arith.addi(_times(thread.warp, columns // WARPS), _times(thread.quad, 4))
    of_x, of_weight = _Rows(x, first), _Rows(weight, first)
    steps, tiles, pieces = columns // STEPS, -(-tokens // TOKENS), experts // EXPERTS
    expert_rows = [arith.addi(thread.row, _word(EXPERTS * j)) for j in range(pieces)]
    # Rows behind the last token: the last one again. Where none of the rows is a token's there is nothing.
    begins = range(0, tokens, ROWS)
    token_rows = [arith.minui(arith.addi(thread.row, _word(begin)), _word(tokens - 1)) for begin in begins]
    stage = _Stage(smem, thread)
    kept = []
    for s in range(steps):
        kept.append([[stage.copy(of, row, STEP * s) for row in rows] for of, rows in ((of_weight, expert_rows), (of_x, token_rows))])
        _ptx("cp.async.commit_group;")
    terms = 3 if isinstance(of_weight.element, ir.F32Type) else 1
    separate = tiles * pieces < BUSY
    sums: dict[tuple[int, int, int], list[ir.Value]] = {}
    for s, (of_experts, of_tokens) in enumerate(kept):
        _ptx(f"cp.async.wait_group {steps - 1 - s};")
        cut = [_terms(stage.load(four)) if terms == 3 else [stage.load(four)] for four in of_experts]
        for i in range(tiles):
            low, high = (stage.load(x) if x else [_word(0)] * 2 for x in (*of_tokens, None)[2 * i : 2 * i + 2])
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
    for first in range(0, size, WARPS * 32):
        found = []
        for warp in range(WARPS):
            at = arith.addi(thread.number, _word(warp * size + first))
            address = utils.getelementptr(smem, [at], ir.F32Type.get())
            found.append(llvm.load(ir.F32Type.get(), address, alignment=4))
        flat.append(functools.reduce(arith.addf, found))
    utils.warpgroup_barrier()  # the memory may be written again
    return flat


class _Rows:
    """Rows of a matrix in device memory, of which a thread reads four neighbours at a time from column `first` on."""

    def __init__(self, ref: ir.Value, first: ir.Value) -> None:
        kind = ir.MemRefType(ref.type)
        self.element = kind.element_type
        self.stride = kind.get_strides_and_offset()[0][0]
        self.size = utils.bitwidth(self.element) // 8
        pointer = llvm.addrspacecast(llvm.PointerType.get(1), utils.memref_ptr(ref))
        self.start = self._moved(pointer, _times(first, self.size))

    def four(self, row: ir.Value, column: int) -> ir.Value:
        """Where four neighbours are, which are `size` words."""
        return self._moved(self.start, arith.addi(_times(row, self.stride * self.size), _word(column * self.size)))

    @staticmethod
    def _moved(pointer: ir.Value, offset: ir.Value) -> ir.Value:
        return llvm.getelementptr(pointer.type, pointer, [offset], [-(2**31)], ir.IntegerType.get_signless(8), None)


class _Stage:
    """Shared memory on the way from device memory to registers: a thread reads what it has copied itself, and waits for
    no other. (With loads in place of copies the compiler starts half of them when others have come.)"""

    def __init__(self, smem: ir.Value, thread: _Thread) -> None:
        self.start, self.thread = llvm.ptrtoint(ir.IntegerType.get_signless(32), smem), thread
        self.used = 0

    def copy(self, rows: _Rows, row: ir.Value, column: int) -> tuple[ir.Value, int]:
        """Starts a copy; where it goes to, and of how many words."""
        size = 4 * rows.size
        to = arith.addi(self.start, arith.addi(_word(self.used), _times(self.thread.number, size)))
        self.used += size * WARPS * 32
        cache = "cg" if size == 16 else "ca"
        _ptx(f"cp.async.{cache}.shared.global [$0], [$1], {size};", to, rows.four(row, column))
        return to, rows.size

    @staticmethod
    def load(kept: tuple[ir.Value, int]) -> list[ir.Value]:
        address, count = kept
        word = ir.IntegerType.get_signless(32)
        outputs = ", ".join(f"${i}" for i in range(count))
        kind = llvm.StructType.get_literal([word] * count)
        constraints = ",".join(["=r"] * count + ["r"])
        ptx = f"ld.shared.v{count}.b32 {{{outputs}}}, [${count}];"
        found = llvm.inline_asm(kind, [address], ptx, constraints, has_side_effects=True)
        return [llvm.extractvalue(word, found, [i]) for i in range(count)]


def _ptx(ptx: str, *args: ir.Value) -> None:
    kinds = ["l" if isinstance(x.type, llvm.PointerType) else "r" for x in args]
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
                arith.subf(arith.bitcast(float32, x), arith.bitcast(float32, u)) for x, u in zip(four, upper, strict=True)
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
    return utils.c(value, ir.IntegerType.get_signless(32))


def _times(x: ir.Value, factor: int) -> ir.Value:
    return arith.muli(x, _word(factor))

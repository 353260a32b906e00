"""Products of a few bfloat16 tokens and a matrix in float32's precision, by a warpgroup.

A float32 number is the exact sum of three bfloat16 terms, each of which mma.sync multiplies by the tokens, with float32
sums. A sum over columns does not care in which order they come: a thread's four neighbours stand where the instruction
wants columns 2t, 2t + 1, 2t + 8 and 2t + 9. The four warps have columns of their own; every term has an accumulator of
its own where there are few, so that products need not wait for one another. The interpreter's twin is one product.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.words import lanes
from pallas_kernels.router.staging_sm90 import (
    ROWS,
    WARP,
    WARPS,
    Staged,
    Swap,
    Thread,
    ptx,
    start_of,
    terms_of,
    times,
    word,
)

TOKENS, EXPERTS, STEP = 16, 8, 16  # of one instruction: rows, columns, and what it sums over
MOST_COLUMNS = 32  # that a warp waits for at a time
BUSY = 8  # accumulators that keep the tensor cores busy


def scratch_words(tokens: int, columns: int, experts: int, weight_bytes: int) -> int:
    """Of shared memory: for what is on its way, and then for the warps' sums."""
    rows = -(-tokens // ROWS) * ROWS
    return max(columns * (experts * weight_bytes + rows * 2) // 4, WARPS * rows * experts)


def start(x_gmem: Any, weight_gmem: Any, smem: Any) -> None:
    """Starts to load what `products` multiplies. smem: float32 [scratch_words]."""
    if is_interpreted():
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
    def run(_ctx: Any, x: ir.Value, weight: ir.Value, smem: ir.Value) -> None:
        _Turns(x, weight, smem).start()

    run(x_gmem, weight_gmem, smem)


def products(x_gmem: Any, weight_gmem: Any, smem: Any) -> jax.Array:
    """x @ weight.T of bfloat16 x [n, columns] and float32 or bfloat16 weight [experts, columns], flat, in `lanes`.

    Behind `start` with the same arguments. Rows behind n, up to the next multiple of 8, are there and not defined.
    """
    tokens, experts = x_gmem.shape[0], weight_gmem.shape[0]
    size = -(-tokens // ROWS) * ROWS * experts
    if is_interpreted():
        x, weight = (ref[...].astype(jnp.float32) for ref in (x_gmem, weight_gmem))
        found = jnp.dot(x, weight.T, precision="highest").reshape(-1)
        return jnp.pad(found, (0, size - len(found)))
    layout = lanes(size)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),) * 3,
        return_type=plgpu.ShapeDtypeStruct((size,), jnp.dtype(jnp.float32), layout=layout),
    )
    def run(_ctx: Any, x: ir.Value, weight: ir.Value, smem: ir.Value) -> Any:
        of_warp = _Turns(x, weight, smem).multiply()
        flat = _over_warps(of_warp, utils.memref_ptr(smem), experts, size)
        registers = np.empty(layout.to_mgpu().registers_shape((size,)), dtype=object)
        one = ir.VectorType.get((1,), ir.F32Type.get())
        registers.flat = [vector.broadcast(one, x) for x in flat]
        return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None)

    return run(x_gmem, weight_gmem, smem)


class _Turns:
    """A warp's columns of both matrices, `width` of them a turn: what is loaded of them, and where to."""

    def __init__(self, x: ir.Value, weight: ir.Value, smem: ir.Value) -> None:
        (self.tokens, columns), (self.experts, _) = (ir.MemRefType(ref.type).shape for ref in (x, weight))
        self.thread = Thread.current()
        own = columns // WARPS
        self.width = math.gcd(own, MOST_COLUMNS)
        first = times(self.thread.warp, own)
        self.x, self.weight = (
            Staged(ref, first, self.width, Swap(8 // size, size), self.thread)  # rows that are loaded at once
            for ref, size in ((x, 2), (weight, utils.bitwidth(ir.MemRefType(weight.type).element_type) // 8))
        )
        self.rows = -(-self.tokens // ROWS) * ROWS
        of_weight, of_x = self.experts * self.weight.pitch, self.rows * self.x.pitch
        turns = own // self.width
        start = arith.addi(start_of(smem), times(self.thread.warp, turns * (of_weight + of_x)))
        starts = [arith.addi(start, word(turn * (of_weight + of_x))) for turn in range(turns)]
        self.places = [(at, arith.addi(at, word(of_weight))) for at in starts]

    def start(self) -> None:
        for turn, (weight_at, x_at) in enumerate(self.places):
            for matrix, at, rows, exist in (
                (self.weight, weight_at, self.experts, self.experts),
                (self.x, x_at, self.rows, self.tokens),
            ):
                firsts = [word(first) for first in range(0, rows, matrix.rows_of_copy)]
                matrix.copy(at, firsts, exist, turn * self.width)
            ptx("cp.async.commit_group;")

    def multiply(self) -> dict[tuple[int, int], list[ir.Value]]:
        """Four sums for every tile of 16 tokens and every 8 experts."""
        tiles, pieces = -(-self.tokens // TOKENS), self.experts // EXPERTS
        terms = 3 if self.weight.size == 4 else 1
        separate = tiles * pieces < BUSY
        sums: dict[tuple[int, int, int], list[ir.Value]] = {}
        for turn, (weight_at, x_at) in enumerate(self.places):
            ptx(f"cp.async.wait_group {len(self.places) - 1 - turn};")
            utils.warp_barrier()
            for step in range(self.width // STEP):
                of_experts = [self._four(self.weight, weight_at, EXPERTS * j, step) for j in range(pieces)]
                cut = [terms_of(four) if terms == 3 else [four] for four in of_experts]
                for i in range(tiles):
                    a = self._of_tokens(x_at, TOKENS * i, step)
                    for term, j in itertools.product(reversed(range(terms)), range(pieces)):  # small ones first
                        at = i, j, term if separate else 0
                        sums[at] = _mma(sums.get(at), a, cut[j][term])

        def total(i: int, j: int) -> list[ir.Value]:
            small_first = [sums[i, j, term] for term in reversed(range(terms)) if (i, j, term) in sums]
            return functools.reduce(lambda a, b: [arith.addf(*both) for both in zip(a, b, strict=True)], small_first)

        return {(i, j): total(i, j) for i, j in itertools.product(range(tiles), range(pieces))}

    def _four(self, matrix: Staged, at: ir.Value, first: int, step: int) -> list[ir.Value]:
        """Four neighbours of the thread's row behind `first`, in as many words as an element has bytes."""
        byte = arith.addi(times(self.thread.quad, 4 * matrix.size), word(STEP * matrix.size * step))
        return matrix.load(at, arith.addi(self.thread.row, word(first)), byte, matrix.size)

    def _of_tokens(self, at: ir.Value, first: int, step: int) -> list[ir.Value]:
        # Where none of the upper rows is a token's there is nothing.
        low, high = (
            self._four(self.x, at, begin, step) if begin < self.rows else [word(0)] * 2
            for begin in (first, first + ROWS)
        )
        return [low[0], high[0], low[1], high[1]]


def _over_warps(
    products: dict[tuple[int, int], list[ir.Value]], smem: ir.Value, experts: int, size: int
) -> list[ir.Value]:
    """What a thread has of the sums over the warps, flat: elements `number`, `number` + 128 .."""
    thread = Thread.current()
    utils.warpgroup_barrier()  # all have read what was on its way
    pair = ir.VectorType.get((2,), ir.F32Type.get())
    start = arith.addi(times(thread.warp, size), arith.addi(times(thread.row, experts), times(thread.quad, 2)))
    for (i, j), four in products.items():
        for half in range(2):
            offset = (TOKENS * i + ROWS * half) * experts + EXPERTS * j
            if offset < size:
                address = utils.getelementptr(smem, [arith.addi(start, word(offset))], ir.F32Type.get())
                llvm.store(vector.from_elements(pair, four[2 * half : 2 * half + 2]), address, alignment=8)
    utils.warpgroup_barrier()
    flat = []
    for first in range(0, size, WARPS * WARP):
        found = []
        for warp in range(WARPS):
            at = arith.addi(thread.number, word(warp * size + first))
            address = utils.getelementptr(smem, [at], ir.F32Type.get())
            found.append(llvm.load(ir.F32Type.get(), address, alignment=4))
        flat.append(functools.reduce(arith.addf, found))
    utils.warpgroup_barrier()  # the memory may be written again
    return flat


def _mma(sums: list[ir.Value] | None, a: list[ir.Value], b: list[ir.Value]) -> list[ir.Value]:
    text = """mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"""
    float32 = ir.F32Type.get()
    if sums is None:
        sums = [arith.constant(float32, 0.0)] * 4
    kind = llvm.StructType.get_literal([float32] * 4)
    found = llvm.inline_asm(kind, [*a, *b, *sums], text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f")
    return [llvm.extractvalue(float32, found, [i]) for i in range(4)]

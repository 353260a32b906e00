"""Products of many bfloat16 tokens and a matrix in float32's precision, by a warpgroup.

As multiply_sm90.py, but with wgmma, the experts as M and the tokens as N: a warp has 16 experts' rows, which it cuts
into terms in registers; the tokens lie in shared memory, for all warps. What comes out is handed over from registers.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.router.staging_sm90 import (
    ROWS,
    WARPS,
    Staged,
    Swap,
    Thread,
    i32,
    ptx,
    start_of,
    terms_of,
    times,
    word,
)
from pallas_kernels.router.words_sm90 import of_float

EXPERTS, STEP = 64, 16  # of one instruction
COLUMNS = 64  # whose tokens are a line of shared memory
MOST_BYTES = 200_000  # of shared memory
SCALAR = plgpu.Layout.WG_SPLAT(())


def scratch_words(tokens: int, columns: int, weight_bytes: int) -> int:
    rows = -(-tokens // ROWS) * ROWS
    return _slots(rows, columns, weight_bytes) * COLUMNS * (EXPERTS * weight_bytes + rows * 2) // 4


def _slots(rows: int, columns: int, weight_bytes: int) -> int:
    """How many turns are on their way at once."""
    return min(columns // COLUMNS, MOST_BYTES // (COLUMNS * (EXPERTS * weight_bytes + rows * 2)))


def place_of(expert: jax.Array) -> jax.Array:
    """Where an expert's logits are among the words of a token: of 16 experts the 8 that a thread has of one row, and
    those of its other row, are neighbours."""
    return (expert & ~15) | ((expert & 7) << 1) | ((expert >> 3) & 1)


def start(x_gmem: Any, weight_gmem: Any, smem: Any) -> None:
    """Starts to load what `hand_over` multiplies. smem: float32 [scratch_words]."""
    if is_interpreted():
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
    def run(_ctx: Any, x: ir.Value, weight: ir.Value, smem: ir.Value) -> None:
        _Turns(x, weight, smem).start()

    run(x_gmem, weight_gmem, smem)


def hand_over(x_gmem: Any, weight_gmem: Any, smem: Any, words_gmem: Any, first: jax.Array, stride: int) -> None:
    """words_gmem[first + n * stride + place_of(e)] = the word of token n's product with expert e of 64.

    Behind `start` with the same arguments.
    """
    if is_interpreted():
        x, weight = (ref[...].astype(jnp.float32) for ref in (x_gmem, weight_gmem))
        words = of_float(jnp.dot(x, weight.T, precision="highest"))
        words = jnp.zeros_like(words).at[:, place_of(jnp.arange(EXPERTS))].set(words)
        for n in range(x_gmem.shape[0]):
            words_gmem[pl.ds(first + n * stride, EXPERTS)] = words[n]
        return

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * 4, SCALAR))
    def run(_ctx: Any, x: ir.Value, weight: ir.Value, smem: ir.Value, words: ir.Value, first: Any) -> None:
        turns = _Turns(x, weight, smem)
        start = utils.getelementptr(utils.memref_ptr(words), [_the(first)], i32())
        turns.hand_over(turns.multiply(), start, stride)

    run(x_gmem, weight_gmem, smem, words_gmem, first)


class _Turns:
    """COLUMNS columns of both matrices a turn: what is loaded of them, and where to."""

    def __init__(self, x: ir.Value, weight: ir.Value, smem: ir.Value) -> None:
        self.tokens, columns = ir.MemRefType(x.type).shape
        self.thread, zero = Thread.current(), word(0)
        self.x = Staged(x, zero, COLUMNS, Swap(8, 1), self.thread)  # as wgmma wants it
        size = utils.bitwidth(ir.MemRefType(weight.type).element_type) // 8
        # Rows that are loaded at once, of two elements each.
        self.weight = Staged(weight, zero, COLUMNS, Swap(16 // size, size // 2), self.thread)
        self.rows = -(-self.tokens // ROWS) * ROWS
        of_weight, of_x = EXPERTS * self.weight.pitch, self.rows * self.x.pitch
        self.turns, self.slots = columns // COLUMNS, _slots(self.rows, columns, size)
        starts = [arith.addi(start_of(smem), word(slot * (of_weight + of_x))) for slot in range(self.slots)]
        self.places = [(at, arith.addi(at, word(of_weight))) for at in starts]
        self.first_expert = times(self.thread.warp, EXPERTS // WARPS)

    def start(self, first: int = 0) -> None:
        """Starts to load the turns `first` .. first + slots."""
        each = self.weight.rows_of_copy
        of_warp = [arith.addi(self.first_expert, word(i)) for i in range(0, EXPERTS // WARPS, each)]
        each, copies = self.x.rows_of_copy, self.rows // self.x.rows_of_copy
        # The warps take turns; where no copy is left, the last one again.
        taken = [arith.addi(self.thread.warp, word(i)) for i in range(0, copies, WARPS)]
        of_tokens = [times(arith.minui(i, word(copies - 1)), each) for i in taken]
        for turn in range(first, min(first + self.slots, self.turns)):
            weight_at, x_at = self.places[turn % self.slots]
            self.weight.copy(weight_at, of_warp, EXPERTS, turn * COLUMNS)
            self.x.copy(x_at, of_tokens, self.tokens, turn * COLUMNS)
            ptx("cp.async.commit_group;")

    def multiply(self) -> list[ir.Value]:
        """Two tokens' sums of either of a thread's two experts, for every 8 tokens."""
        sums = [arith.constant(ir.F32Type.get(), 0.0)] * (self.rows // 2)
        for turn in range(self.turns):
            slot = turn % self.slots
            if turn and not slot:
                sums = _awaited(sums)
                utils.warpgroup_barrier()  # all have read what was loaded
                self.start(turn)
            ptx(f"cp.async.wait_group {min(self.slots, self.turns - turn + slot) - 1 - slot};")
            ptx("fence.proxy.async.shared::cta;")
            utils.warpgroup_barrier()
            weight_at, x_at = self.places[slot]
            sums = _wgmma(sums, [self._terms(weight_at, step) for step in range(COLUMNS // STEP)], x_at, self.rows)
        return _awaited(sums)

    def _terms(self, at: ir.Value, step: int) -> list[list[ir.Value]]:
        """The four registers of every term of the warp's 16 experts."""
        size, rows = self.weight.size, []
        for half in range(2):
            row = arith.addi(arith.addi(self.first_expert, self.thread.row), word(ROWS * half))
            found = []
            for column in (STEP * step, STEP * step + STEP // 2):
                byte = arith.addi(times(self.thread.quad, 2 * size), word(column * size))
                found += self.weight.load(at, row, byte, size // 2)
            rows.append(terms_of(found) if size == 4 else [found])
        return [[low[0], high[0], low[1], high[1]] for low, high in zip(*rows, strict=True)]

    def hand_over(self, sums: list[ir.Value], start: ir.Value, stride: int) -> None:
        column = arith.addi(self.first_expert, times(self.thread.row, 2))
        for i in range(self.rows // ROWS):
            for token_of_two in range(2):
                token = arith.addi(times(self.thread.quad, 2), word(ROWS * i + token_of_two))
                pair = [_word_of(sums[4 * i + token_of_two + 2 * half]) for half in range(2)]
                address = utils.getelementptr(start, [arith.addi(times(token, stride), column)], i32())
                exists = arith.cmpi(arith.CmpIPredicate.ult, token, word(self.tokens))
                text = "@$3 st.relaxed.gpu.global.v2.b32 [$0], {$1, $2};"
                llvm.inline_asm(None, [address, *pair, exists], text, "l,r,r,b,~{memory}", has_side_effects=True)


def _word_of(x: ir.Value) -> ir.Value:
    """As `of_float`."""
    bits = arith.bitcast(i32(), x)
    return arith.select(arith.cmpi(arith.CmpIPredicate.eq, bits, word(0)), word(-(2**31)), bits)


def _wgmma(sums: list[ir.Value], terms: list[list[list[ir.Value]]], x_at: ir.Value, rows: int) -> list[ir.Value]:
    """Adds the products of every step's terms, small ones first; `_awaited` has them."""
    operands = [register for of_step in terms for of_term in reversed(of_step) for register in of_term]
    count = len(sums)
    accumulators = ", ".join(f"${i}" for i in range(count))
    lines, at = ["wgmma.fence.sync.aligned;"], 2 * count
    for step, of_step in enumerate(terms):
        lines.append(f"add.s64 x, ${2 * count + len(operands)}, {step * STEP * 2 // 16};")
        for _ in of_step:
            a = ", ".join(f"${i}" for i in range(at, at + 4))
            lines.append(
                f"wgmma.mma_async.sync.aligned.m64n{rows}k16.f32.bf16.bf16 {{{accumulators}}}, {{{a}}}, x, 1, 1, 1, 0;"
            )
            at += 4
    text = "{ .reg .b64 x; " + "\n".join([*lines, "wgmma.commit_group.sync.aligned;"]) + " }"
    kinds = ["=f"] * count + [str(i) for i in range(count)] + ["r"] * len(operands) + ["l", "~{memory}"]
    args = [*sums, *operands, _descriptor(x_at)]
    return _floats(llvm.inline_asm(_struct(count), args, text, ",".join(kinds), has_side_effects=True), count)


def _awaited(sums: list[ir.Value]) -> list[ir.Value]:
    count = len(sums)
    kinds = ",".join(["=f"] * count + [str(i) for i in range(count)] + ["~{memory}"])
    text = "wgmma.wait_group.sync.aligned 0;"
    return _floats(llvm.inline_asm(_struct(count), sums, text, kinds, has_side_effects=True), count)


def _descriptor(at: ir.Value) -> ir.Value:
    """Of rows of 128 bytes, eight of them 1024 bytes behind the eight before, swizzled by 128 bytes."""
    word64 = ir.IntegerType.get_signless(64)
    fixed = 1 << 62 | (1024 >> 4) << 32 | 1 << 16
    address = arith.extui(word64, arith.shrui(arith.andi(at, word(0x3FFFF)), word(4)))
    return arith.ori(address, arith.constant(word64, fixed))


def _struct(count: int) -> ir.Type:
    return llvm.StructType.get_literal([ir.F32Type.get()] * count)


def _floats(struct: ir.Value, count: int) -> list[ir.Value]:
    return [llvm.extractvalue(ir.F32Type.get(), struct, [i]) for i in range(count)]


def _the(x: Any) -> ir.Value:
    """The value of a scalar."""
    value = x.registers.item()
    return vector.extract(value, [], [0]) if isinstance(value.type, ir.VectorType) else value

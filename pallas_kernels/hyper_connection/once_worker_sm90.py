"""Pieces of a worker of the form that reads streams once."""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils, utils
from jax.experimental.mosaic.gpu.wgmma import wgmma_fence, wgmma_m64
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from pallas_kernels.block_matmul.kernel_sm90 import swizzled
from pallas_kernels.hyper_connection.codes_sm90 import neighbours
from pallas_kernels.mosaic.addresses import constant, i32, i64
from pallas_kernels.mosaic.cluster import SPLAT, address, asm, expect_at, moved
from pallas_kernels.mosaic.fresh_wgmma import _zeros
from pallas_kernels.mosaic.warp import lane, thread, warp

STREAMS = 4
TOKENS = 16
QUARTER = 64
PARTS = 16
ROWS = 20  # outputs
SWIZZLED = swizzled(2)
WGMMA = plgpu.Layout.WGMMA
AHEAD = 2  # pieces of a tile that are loaded before they are squared
PAIRS = plgpu.Layout.WG_STRIDED((256,), vec_size=2)
HELD = neighbours(TOKENS * QUARTER)  # a thread has eight neighbours of a token


def f32() -> ir.Type:
    return ir.F32Type.get()


def eq(a, b):
    return arith.cmpi(arith.CmpIPredicate.eq, a, b)


def lt(a, b):
    return arith.cmpi(arith.CmpIPredicate.ult, a, b)


def muli(a, b):
    return arith.muli(a, constant(b))


def select(p, a, b):
    return arith.select(p, a, b)


def load_rows(fn_gmem: Any, part: jax.Array, quarter: jax.Array) -> list[jax.Array]:
    """Six rows of fn of each stream, of a quarter's columns: two numbers a thread of each, as `terms_of` takes them."""
    width = fn_gmem.shape[1] // STREAMS
    found = plgpu.ShapeDtypeStruct((256,), jnp.float32, layout=PAIRS)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT, SPLAT), return_type=[found] * (6 * STREAMS))
    def run(_ctx: Any, fn: ir.Value, part: Any, quarter: Any) -> Any:
        part, quarter = part.registers.item(), quarter.registers.item()
        w, l = warp(), lane()
        column = arith.addi(arith.addi(muli(part, 4 * QUARTER), muli(quarter, QUARTER)), muli(l, 2))
        rows = [w, arith.addi(w, constant(4))] + [arith.addi(muli(w, 4), constant(8 + j)) for j in range(4)]
        base = utils.memref_ptr(fn)
        at = [arith.addi(muli(row, STREAMS * width), column) for row in rows]
        places = [arith.addi(i, constant(s * width)) for s in range(STREAMS) for i in at]
        return [of_pair(_load_pair(utils.getelementptr(base, [i], f32()))) for i in places]

    return run(fn_gmem, part, quarter)


def of_pair(values: list[ir.Value]) -> Any:
    registers = np.empty((1,), dtype=object)
    registers.flat = [vector.from_elements(ir.VectorType.get((2,), f32()), values)]
    return mgpu.FragmentedArray(_registers=registers, _layout=PAIRS.to_mgpu(), _is_signed=None)


def terms_of(rows: list[jax.Array], tile_smem: Any) -> list[jax.Array]:
    """fn of a quarter of each stream as [64, 64] bfloat16; tile_smem [4, tokens, 64] is overwritten."""
    found = plgpu.ShapeDtypeStruct((64, 64), jnp.bfloat16, layout=WGMMA)

    @plgpu.inline_mgpu(arg_types=([PAIRS] * len(rows), plgpu.RefType(SWIZZLED)), return_type=[found] * STREAMS)
    def run(_ctx: Any, rows: Any, tile: ir.Value) -> Any:
        w, l = warp(), lane()
        loaded = [[vector.extract(row.registers.item(), [], [i]) for i in range(2)] for row in rows]
        base = arith.addi(address(tile), arith.addi(muli(w, 2048), muli(arith.andi(l, constant(3)), 4)))
        chunk = arith.shrui(l, constant(2))
        at = [arith.addi(base, muli(arith.xori(chunk, constant(row)), 16)) for row in range(8)]
        fragments = []
        for s in range(STREAMS):
            pre, post, *comb = loaded[6 * s : 6 * s + 6]
            outputs = [pre, post] + [[arith.subf(x, y) for x, y in zip(other, comb[0])] for other in comb[1:]]
            asm("bar.warp.sync 0xffffffff;", "")  # a warp reads its own rows
            places = [(0, 8, 5), (1, 9, 6), (2, 10, 7), (3, 11, 13), (4, 12, 14)]
            for rest, of_terms in zip(outputs, places, strict=True):
                for n, row in enumerate(of_terms):
                    word = _rounded(rest)
                    if n < 2:
                        rest = [arith.subf(x, t) for x, t in zip(rest, _halves(word))]
                    asm(f"st.shared.b32 [$0+{128 * row}], $1;", "r,r", at[row % 8], word)
            asm(f"st.shared.b32 [$0+{128 * 15}], $1;", "r,r", at[7], constant(0))
            asm("bar.warp.sync 0xffffffff;", "")
            fragments.append(_own_rows(address(tile), w, l))
        return fragments

    return run(rows, tile_smem)


def _own_rows(at: ir.Value, w: ir.Value, l: ir.Value) -> Any:
    """[64, 64] as wgmma's first operand, each warp its 16 rows."""
    layout = WGMMA.to_mgpu()
    matrix, row = arith.shrui(l, constant(3)), arith.andi(l, constant(7))
    base = arith.addi(at, muli(w, 2048))
    base = arith.addi(base, arith.addi(muli(arith.andi(matrix, constant(1)), 1024), muli(row, 128)))
    words = []
    for step in range(4):
        chunk = arith.xori(arith.addi(arith.shrui(matrix, constant(1)), constant(2 * step)), row)
        words += _ldmatrix(arith.addi(base, muli(chunk, 16)))
    registers = np.empty(layout.registers_shape((64, 64)), dtype=object)
    pair = ir.VectorType.get((2,), ir.BF16Type.get())
    registers.flat = [llvm.bitcast(pair, word) for word in words]
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _load_pair(at: ir.Value) -> list[ir.Value]:
    struct = llvm.StructType.get_literal([f32()] * 2)
    found = llvm.inline_asm(struct, [at], "ld.global.nc.v2.f32 {$0, $1}, [$2];", "=f,=f,l", has_side_effects=True)
    return [llvm.extractvalue(f32(), found, [i]) for i in range(2)]


def _rounded(x: list[ir.Value]) -> ir.Value:
    """Two numbers as bfloat16, the first in the lower half."""
    return llvm.inline_asm(i32(), [x[1], x[0]], "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f")


def load_streams(
    streams_gmem: Any, tile_smem: Any, barriers: Any, i: jax.Array, token: jax.Array, part: jax.Array
) -> None:
    """Copies a tile of streams [m, 4, D] to [4 quarters, 4, tokens, 64]; barrier i is complete when it is there."""
    quarters, _, tokens, _ = tile_smem.shape
    whole = plgpu.RefType(), plgpu.RefType(SWIZZLED), plgpu.RefType(), *[SPLAT] * 3

    @plgpu.inline_mgpu(arg_types=whole)
    def run(ctx: Any, streams: ir.Value, tile: ir.Value, barriers: ir.Value, i: Any, token: Any, part: Any) -> None:
        i, token, part = (x.registers.item() for x in (i, token, part))
        first = eq(thread(), constant(0))
        with utils.when(first):
            expect_at(arith.addi(address(barriers), muli(i, 8)), quarters * STREAMS * tokens * QUARTER * 2)
        word = utils.getelementptr(utils.memref_ptr(barriers), [muli(i, 2)], i32())
        index = ir.IndexType.get()
        for q in range(quarters):
            column = arith.addi(muli(part, quarters * QUARTER), constant(q * QUARTER))
            ctx.async_copy(
                src_ref=streams,
                dst_ref=utils.memref_slice(tile, q),
                gmem_slice=(
                    utils.DynamicSlice(arith.index_cast(index, token), tokens),
                    slice(None),
                    utils.DynamicSlice(arith.index_cast(index, column), QUARTER),
                ),
                gmem_transform=(mgpu.TransposeTransform((1, 0, 2)), mgpu.TileTransform((8, QUARTER))),
                barrier=utils.BarrierRef(word, constant(0), None, 1),
                swizzle=128,
                arrive=False,
                predicate=first,
            )

    run(streams_gmem, tile_smem, barriers, i, token, part)


def start_products(fn: list[jax.Array], tile_smem: Any) -> jax.Array:
    """[64, tokens], to be waited for; tile_smem [4, tokens, 64].

    Two accumulators that take turns would not wait for one another, but the compiler then waits for each product.
    """
    shape = 64, tile_smem.shape[1]
    found = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=WGMMA)

    @plgpu.inline_mgpu(arg_types=([WGMMA] * STREAMS, plgpu.RefType(SWIZZLED)), return_type=found)
    def run(_ctx: Any, fn: Any, tile: ir.Value) -> Any:
        accumulator = mgpu.WGMMAAccumulator.from_registers(_zeros(shape))
        for s, of_stream in enumerate(fn):
            tokens = utils.memref_slice(tile, s)
            accumulator = mgpu.wgmma(accumulator, of_stream, mgpu.memref_transpose(tokens, (1, 0, 3, 2)), swizzle=128)
        nvvm.wgmma_commit_group_sync_aligned()
        return accumulator.value

    return run(fn, tile_smem)


def square(tile_smem: Any) -> list[jax.Array]:
    """Of each stream of each token of a thread block's tile [4 quarters, 4, tokens, 64], as `store_squares` takes it."""
    tokens = tile_smem.shape[2]
    pitch = tokens * 128

    units = tokens // TOKENS
    found = plgpu.ShapeDtypeStruct((256,), jnp.float32, layout=PAIRS)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(SWIZZLED),), return_type=[found] * units)
    def run(_ctx: Any, tile: ir.Value) -> Any:
        results = []
        w, l = warp(), lane()
        matrix, row = arith.shrui(l, constant(3)), arith.andi(l, constant(7))
        g = arith.shrui(l, constant(2))
        odd = eq(arith.andi(g, constant(1)), constant(1))
        zero = arith.constant(f32(), ir.FloatAttr.get(f32(), 0.0))
        base = arith.addi(address(tile), muli(w, pitch))
        base = arith.addi(base, arith.addi(muli(arith.andi(matrix, constant(1)), 1024), muli(row, 128)))
        chunk = arith.shrui(matrix, constant(1))
        at = [
            arith.addi(base, muli(arith.xori(arith.addi(chunk, constant(2 * step)), row), 16)) for step in range(4)
        ]
        for u in range(units):
            sums = [[[zero] * 4, [zero] * 4] for _ in range(2)]  # of even and odd quarters, of each half of the tokens
            places = [moved(at[n % 4], (n // 4) * STREAMS * pitch + 2048 * u) for n in range(16)]
            loaded = [_ldmatrix(place) for place in places[:AHEAD]]
            for n in range(16):
                a = loaded.pop(0)
                if n + AHEAD < 16:
                    loaded.append(_ldmatrix(places[n + AHEAD]))
                of_quarter = sums[n // 4 % 2]
                for half in range(2):
                    of_quarter[half] = _mma(of_quarter[half], a, [a[half], a[half + 2]])
            low, high = (
                arith.addf(*(select(odd, of_quarter[half][i + 1], of_quarter[half][i]) for of_quarter in sums))
                for half, i in ((0, 0), (1, 2))
            )
            results.append(of_pair([low, high]))
        return results

    return run(tile_smem)


def store_squares(squares: list[jax.Array], squares_smem: Any) -> None:
    """squares_smem[s, t] = of stream s of token t."""
    tokens = squares_smem.shape[1]

    @plgpu.inline_mgpu(arg_types=([PAIRS] * len(squares), plgpu.RefType()))
    def run(_ctx: Any, squares: Any, to: ir.Value) -> None:
        w, l = warp(), lane()
        g, t = arith.shrui(l, constant(2)), arith.andi(l, constant(3))
        with utils.when(eq(t, arith.shrui(g, constant(1)))):
            at = arith.addi(address(to), arith.addi(muli(w, 4 * tokens), muli(g, 4)))
            for u, of_unit in enumerate(squares):
                low, high = (vector.extract(of_unit.registers.item(), [], [i]) for i in range(2))
                asm("st.shared.f32 [$0], $1;", "r,f", moved(at, 64 * u), low)
                asm("st.shared.f32 [$0], $1;", "r,f", moved(at, 64 * u + 32), high)

    run(squares, squares_smem)


def _ldmatrix(at: ir.Value) -> list[ir.Value]:
    kind = llvm.StructType.get_literal([i32()] * 4)
    text = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];"
    found = llvm.inline_asm(kind, [at], text, "=r,=r,=r,=r,r,~{memory}", has_side_effects=True)
    return [llvm.extractvalue(i32(), found, [i]) for i in range(4)]


def _mma(c: list[ir.Value], a: list[ir.Value], b: list[ir.Value]) -> list[ir.Value]:
    kind = llvm.StructType.get_literal([f32()] * 4)
    text = (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {$8, $9, $10, $11}, {$12, $13}, "
        "{$4, $5, $6, $7};"
    )
    constraints = ",".join(["=f"] * 4 + [str(i) for i in range(4)] + ["r"] * 6)
    found = llvm.inline_asm(kind, [*c, *a, *b], text, constraints, has_side_effects=True)
    return [llvm.extractvalue(f32(), found, [i]) for i in range(4)]


def store_products(products: jax.Array, partial_smem: Any) -> None:
    """Sums of the terms of products [64, tokens] become partial[5 w + o]."""
    pitch = partial_smem.shape[1]

    @plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.RefType()))
    def run(_ctx: Any, products: Any, partial: ir.Value) -> None:
        w, l = warp(), lane()
        g, t = arith.shrui(l, constant(2)), arith.andi(l, constant(3))
        registers = products.registers.ravel()
        early = lt(g, constant(3))
        to = arith.addi(muli(arith.addi(muli(w, 5), g), 4 * pitch), muli(t, 8))
        to = arith.addi(address(partial), to)
        pairs = []
        for j in range(pitch // 8):
            pair = []
            for i in range(2):
                v0, v1 = (vector.extract(registers[2 * j + h], [], [i]) for h in range(2))
                small = select(early, _from_lane(v0, l, 20), _from_lane(v1, l, 8))
                pair.append(arith.addf(arith.addf(small, v1), v0))
            pairs.append(pair)
        with utils.when(lt(g, constant(5))):
            for j, pair in enumerate(pairs):
                asm("st.shared.v2.f32 [$0], {$1, $2};", "r,f,f", moved(to, 32 * j), *pair)

    run(products, partial_smem)


def _from_lane(x: ir.Value, l: ir.Value, ahead: int) -> ir.Value:
    source = arith.andi(arith.addi(l, constant(ahead)), constant(31))
    text = "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;"
    word = llvm.inline_asm(i32(), [llvm.bitcast(i32(), x), source], text, "=r,r,r", has_side_effects=True)
    return llvm.bitcast(f32(), word)


def weigh(tile_smem: Any, weights_smem: Any, squares_smem: Any) -> jax.Array:
    """x [1024] of a tile of 16 tokens; squares[t] = the sum of x's squares. weights [tokens, 4]."""
    found = plgpu.ShapeDtypeStruct((TOKENS * QUARTER,), jnp.float32, layout=HELD)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(SWIZZLED), plgpu.RefType(), plgpu.RefType()), return_type=found)
    def run(_ctx: Any, tile: ir.Value, weights: ir.Value, squares: ir.Value) -> Any:
        weighing = _Weighing(tile, weights, squares)
        for _ in range(_Weighing.STEPS):
            weighing.step()
        return weighing.end()

    return run(tile_smem, weights_smem, squares_smem)


class _Weighing:
    """The sum of streams by their weights, two columns of a thread at a time."""

    STEPS = 4 * STREAMS

    def __init__(self, tile: ir.Value, weights: ir.Value, squares: ir.Value) -> None:
        self.token, self.chunk = arith.shrui(thread(), constant(3)), arith.andi(thread(), constant(7))
        at = arith.addi(address(tile), muli(self.token, 128))
        self.at = arith.addi(at, muli(arith.xori(self.chunk, arith.andi(self.token, constant(7))), 16))
        self.weights = load_four(arith.addi(address(weights), muli(self.token, 16)), f32())
        self.squares, self.done = squares, 0
        self.x: list[Any] = [None] * 8
        self.words = self._stream(0)

    def _stream(self, s: int) -> list[ir.Value]:
        return load_four(moved(self.at, s * TOKENS * 128), i32())

    def step(self) -> None:
        s, i = divmod(self.done, 4)
        for e, value in enumerate(_halves(self.words[i]), 2 * i):
            self.x[e] = fma(self.weights[s], value, self.x[e]) if s else _mul(self.weights[s], value)
        self.done += 1
        if i == 3 and s + 1 < STREAMS:
            self.words = self._stream(s + 1)

    def end(self) -> Any:
        total = _mul(self.x[0], self.x[0])
        for value in self.x[1:]:
            total = fma(value, value, total)
        for distance in (1, 2, 4):
            total = arith.addf(total, utils.shfl_bfly(total, distance))
        with utils.when(eq(self.chunk, constant(0))):
            asm("st.shared.f32 [$0], $1;", "r,f", arith.addi(address(self.squares), muli(self.token, 4)), total)
        return held(self.x)


def advance(
    fn: list[jax.Array], tile_smem: Any, old_smem: Any, weights_smem: Any, squares_smem: Any
) -> tuple[jax.Array, jax.Array]:
    """`start_products` of a tile and `weigh` of an older one, whose instructions fill the time between products."""
    shape = 64, tile_smem.shape[1]
    product = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=WGMMA)
    found = plgpu.ShapeDtypeStruct((TOKENS * QUARTER,), jnp.float32, layout=HELD)
    tiles = plgpu.RefType(SWIZZLED), plgpu.RefType(SWIZZLED), plgpu.RefType(), plgpu.RefType()

    @plgpu.inline_mgpu(arg_types=([WGMMA] * STREAMS, *tiles), return_type=(product, found))
    def run(_ctx: Any, fn: Any, tile: ir.Value, old: ir.Value, weights: ir.Value, squares: ir.Value) -> Any:
        bf16 = ir.BF16Type.get()
        weighing = _Weighing(old, weights, squares)
        accumulator = mgpu.WGMMAAccumulator.from_registers(_zeros(shape))
        fn = [wgmma_fence(of_stream) for of_stream in fn]
        registers = accumulator._value.registers.copy()
        for s, of_stream in enumerate(fn):
            tokens = mgpu.memref_transpose(utils.memref_slice(tile, s), (1, 0, 3, 2))
            (base, stride), _, fastest = mma_utils.create_descriptor(
                tokens, swizzle=128, large_tile=(64, 64), group_size=(64, shape[1]), logical_k_major=True
            )
            for step in range(4):
                offset = utils.c((step * stride[1][0]) >> 4, i64())
                at = llvm.add(base, offset, overflow_flags=llvm.IntegerOverflowFlags.none)
                registers = wgmma_m64(
                    registers, of_stream[:, 16 * step : 16 * step + 16], at,
                    a_transpose=None, b_transpose=fastest != mma_utils.Dim.K, a_k_stride=None, b_k_stride=32,
                    n=shape[1], swizzle=32, a_element_type=bf16, b_element_type=bf16,
                )  # fmt: skip
                weighing.step()
        nvvm.wgmma_commit_group_sync_aligned()
        value = mgpu.FragmentedArray(_registers=registers, _layout=accumulator._value.layout, _is_signed=None)
        accumulator = mgpu.WGMMAAccumulator(
            _value=value, _original_layout=accumulator._original_layout, _sync=False
        )
        return accumulator.value, weighing.end()

    return run(fn, tile_smem, old_smem, weights_smem, squares_smem)


def held(x: list[ir.Value]) -> Any:
    layout = HELD.to_mgpu()
    registers = np.empty(layout.registers_shape((TOKENS * QUARTER,)), dtype=object)
    registers.flat = [vector.from_elements(ir.VectorType.get((8,), f32()), x)]
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def load_four(at: ir.Value, kind: ir.Type) -> list[ir.Value]:
    struct = llvm.StructType.get_literal([kind] * 4)
    r, suffix = ("f", "f32") if kind == f32() else ("r", "b32")
    text = f"ld.shared.v4.{suffix} {{$0, $1, $2, $3}}, [$4];"
    found = llvm.inline_asm(struct, [at], text, ",".join([f"={r}"] * 4 + ["r", "~{memory}"]), has_side_effects=True)
    return [llvm.extractvalue(kind, found, [i]) for i in range(4)]


def load_one(at: ir.Value) -> ir.Value:
    return llvm.inline_asm(f32(), [at], "ld.shared.f32 $0, [$1];", "=f,r,~{memory}", has_side_effects=True)


def _halves(word: ir.Value) -> list[ir.Value]:
    low = arith.shli(word, constant(16))
    high = arith.andi(word, constant(-65536))
    return [llvm.bitcast(f32(), low), llvm.bitcast(f32(), high)]


def fma(a, b, c):
    return llvm.inline_asm(f32(), [a, b, c], "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f")


def _mul(a, b):
    return llvm.inline_asm(f32(), [a, b], "mul.rn.f32 $0, $1, $2;", "=f,f,f")


def _load_global(at: ir.Value) -> list[ir.Value]:
    """Eight numbers; no compiler keeps them in registers."""
    found = []
    for offset in (0, 16):
        struct = llvm.StructType.get_literal([f32()] * 4)
        text = f"ld.global.nc.v4.f32 {{$0, $1, $2, $3}}, [$4+{offset}];"
        four = llvm.inline_asm(struct, [at], text, "=f,=f,=f,=f,l", has_side_effects=True)
        found += [llvm.extractvalue(f32(), four, [i]) for i in range(4)]
    return found


def load_factors(norm_weight_gmem: Any, part: jax.Array, quarter: jax.Array) -> jax.Array:
    """[1024]: the eight of each thread's columns."""
    found = plgpu.ShapeDtypeStruct((TOKENS * QUARTER,), jnp.float32, layout=HELD)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT, SPLAT), return_type=found)
    def run(_ctx: Any, factors: ir.Value, part: Any, quarter: Any) -> Any:
        column = arith.addi(muli(part.registers.item(), 4 * QUARTER), muli(quarter.registers.item(), QUARTER))
        column = arith.addi(column, muli(arith.andi(thread(), constant(7)), 8))
        return held(_load_global(utils.getelementptr(utils.memref_ptr(factors), [column], f32())))

    return run(norm_weight_gmem, part, quarter)


def store_x(
    x_gmem: Any, x: jax.Array, factors: jax.Array, inverse_smem: Any, first: int, token: jax.Array,
    part: jax.Array, quarter: jax.Array,
) -> None:  # fmt: skip
    """Of tokens from `token` on; inverse[first + t]: of the root of the mean square."""
    tokens, width = x_gmem.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), HELD, HELD, plgpu.RefType(), SPLAT, SPLAT, SPLAT))
    def run(_ctx: Any, to: ir.Value, x: Any, factors: Any, inverse: ir.Value, token: Any, part: Any, quarter: Any):
        of_tile, chunk = arith.shrui(thread(), constant(3)), arith.andi(thread(), constant(7))
        column = arith.addi(muli(part.registers.item(), 4 * QUARTER), muli(quarter.registers.item(), QUARTER))
        column = arith.addi(column, muli(chunk, 8))
        scale = load_one(arith.addi(address(inverse), arith.addi(muli(of_tile, 4), constant(4 * first))))
        values, weights = (
            [vector.extract(array.registers.item(), [], [i]) for i in range(8)] for array in (x, factors)
        )
        y = [_mul(_mul(value, scale), weight) for value, weight in zip(values, weights)]
        words = [
            llvm.inline_asm(i32(), [y[i + 1], y[i]], "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f") for i in range(0, 8, 2)
        ]
        row = arith.addi(token.registers.item(), of_tile)
        index = arith.addi(arith.muli(arith.extui(i64(), row), arith.constant(i64(), width)), arith.extui(i64(), column))
        there = utils.getelementptr(utils.memref_ptr(to), [index], ir.BF16Type.get())
        text = "@$5 st.global.v4.b32 [$0], {$1, $2, $3, $4};"
        exists = lt(row, constant(tokens))
        llvm.inline_asm(None, [there, *words, exists], text, "l,r,r,r,r,b,~{memory}", has_side_effects=True)

    run(x_gmem, x, factors, inverse_smem, token, part, quarter)


def tree(values: list[ir.Value]) -> ir.Value:
    while len(values) > 1:
        values = [arith.addf(a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


sum_four = functools.partial(functools.reduce, arith.addf)

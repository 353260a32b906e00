"""Rows sorted by expert, of many tokens, on Hopper: a counting sort whose counts are there by tile.

A row's place is behind all rows of lower experts, those of its expert in earlier tiles, and those before it in its own.
A thread block has a tile. Its warpgroup adds up the counts of all tiles and of those before, the first warp adds up
lower experts and then goes through the rows, 32 at a time: MATCH finds the lanes with the same expert.

Bound: the latency of loading the counts, nine loads one behind the other for 132 tiles, and of a step for every 32
rows of a tile. 24576 rows of 256 experts take an H200 5.4 us.
"""

# Pallas decorators turn functions into values, and its transforms look abstract; Mosaic's Python is not typed for
# outsiders.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, scf

from pallas_kernels.mosaic.addresses import constant, i32
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.launch import compiler_params
from pallas_kernels.mosaic.warp import WARP, before, element, lane, sync_warp, warp
from pallas_kernels.mosaic.words import lanes
from pallas_kernels.router.tiling import LANES
from pallas_kernels.router.warps_sm90 import keep

AT_ONCE = 16  # loads of counts
AHEAD = 8  # loads of rows


def order(experts: jax.Array, counts: jax.Array, of_tile: int) -> tuple[jax.Array, jax.Array]:
    """The rows of experts [N, k], flat, sorted by expert and then by row, int32 [N * k]; and the counts of all, [E].

    counts int32 [tiles, E]: rows of each expert in each tile of `of_tile` rows.
    """
    flat, (tiles, count) = experts.reshape(-1), counts.shape
    vector = lanes(count)

    def kernel(experts_gmem, counts_gmem, order_gmem, total_gmem, *, total_smem, earlier_smem):
        tile = lax.axis_index("tile")

        def of_tiles(i, sums):
            earlier, total = sums
            at = [i * AT_ONCE + j for j in range(min(AT_ONCE, tiles))]
            found = [plgpu.load(counts_gmem.at[jnp.minimum(t, tiles - 1)], layout=vector, optimized=False) for t in at]
            for t, one in zip(at, found, strict=True):
                earlier = earlier + one * (t < tile).astype(jnp.int32)
                total = total + one * (t < tiles).astype(jnp.int32)
            return earlier, total

        zero = plgpu.layout_cast(jnp.zeros((count,), jnp.int32), vector)
        earlier, total = lax.fori_loop(0, -(-tiles // AT_ONCE), of_tiles, (zero, zero))
        keep((total_smem, total), (earlier_smem.at[pl.ds(0, count)], earlier))
        pl.when(tile == 0)(lambda: store(total_gmem, total))
        rank(experts_gmem, order_gmem, total_smem, earlier_smem, tile * of_tile, of_tile)

    def store(ref, x):
        ref[...] = x

    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(flat.shape, jnp.int32), jax.ShapeDtypeStruct((count,), jnp.int32)],
        grid=(tiles,),
        grid_names=("tile",),
        compiler_params=compiler_params(),
        scratch_types={
            "total_smem": plgpu.SMEM((count,), jnp.int32),
            "earlier_smem": plgpu.SMEM((count + LANES,), jnp.int32),  # behind those of experts, rows that do not exist
        },
    )(flat, counts)


def rank(
    experts_gmem: Any, order_gmem: Any, total_smem: Any, earlier_smem: Any, start: jax.Array, of_tile: int
) -> None:
    """order_gmem[place of row i] = i for the `of_tile` rows from `start` on, as far as there are.

    total_smem int32 [E]: all rows of an expert; earlier_smem: those in earlier tiles, which is written over.
    """
    rows, count = order_gmem.shape[0], total_smem.shape[0]
    if is_interpreted():
        flat, i = experts_gmem[...], jnp.arange(rows)
        mine = (i >= start) & (i < start + of_tile)
        first = jnp.cumsum(total_smem[...]) - total_smem[...] + earlier_smem[pl.ds(0, count)]
        earlier = (flat[:, None] == flat[None]) & mine[None] & (i[:, None] > i[None])
        places = first[flat] + jnp.sum(earlier, axis=1, dtype=jnp.int32)

        @pl.loop(0, of_tile)
        def _row(j):
            @pl.when(start + j < rows)
            def _there():
                order_gmem[places[start + j]] = start + j

        return
    each, chunks = count // WARP, -(-of_tile // WARP)
    ahead = min(AHEAD, chunks)

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * 4, plgpu.Layout.WG_SPLAT(())))
    def run(_ctx: Any, experts: ir.Value, order: ir.Value, total: ir.Value, earlier: ir.Value, start: Any) -> None:
        first_warp = scf.IfOp(arith.cmpi(arith.CmpIPredicate.eq, warp(), constant(0)))
        with ir.InsertionPoint(first_warp.then_block):
            _start_places(total, earlier, each)
            begin = start.registers.item()
            end = arith.minsi(arith.addi(begin, constant(of_tile)), constant(rows))
            step = constant(ahead * WARP)
            loop = scf.ForOp(begin, end, step)
            with ir.InsertionPoint(loop.body):
                own = arith.addi(loop.induction_variable, lane())
                at = [arith.addi(own, constant(WARP * j)) for j in range(ahead)]
                found = [_load(experts, i, end, count) for i in at]
                for i, expert in zip(at, found, strict=True):
                    _place(order, earlier, i, end, expert)
                scf.yield_([])
            scf.yield_([])

    run(experts_gmem, order_gmem, total_smem, earlier_smem, start)


def _start_places(total: ir.Value, earlier: ir.Value, each: int) -> None:
    """earlier[e] += the sum of total below e, by one warp: a lane has `each` neighbours."""
    first = arith.muli(lane(), constant(each))
    at = [arith.addi(first, constant(i)) for i in range(each)]
    own = [llvm.load(i32(), element(total, i), alignment=4) for i in at]
    below = before(functools.reduce(arith.addi, own))
    for i, one in zip(at, own, strict=True):
        place = element(earlier, i)
        llvm.store(arith.addi(llvm.load(i32(), place, alignment=4), below), place, alignment=4)
        below = arith.addi(below, one)
    sync_warp()


def _load(experts: ir.Value, i: ir.Value, end: ir.Value, nobody: int) -> ir.Value:
    """The expert of row i, `nobody` where there is no such row."""
    text = "{ .reg .pred p; setp.lt.s32 p, $2, $3; mov.b32 $0, $4; @p ld.global.b32 $0, [$1]; }"
    args = [element(experts, i), i, end, constant(nobody)]
    return llvm.inline_asm(i32(), args, text, "=&r,l,r,r,r", has_side_effects=True)


def _place(order: ir.Value, next_: ir.Value, i: ir.Value, end: ir.Value, expert: ir.Value) -> None:
    """Stores row i of each lane where the next of its expert goes."""
    same = llvm.inline_asm(i32(), [expert], "match.any.sync.b32 $0, $1, 0xffffffff;", "=r,r", has_side_effects=True)
    below = llvm.inline_asm(i32(), [], "mov.u32 $0, %lanemask_lt;", "=r")
    earlier = math.ctpop(arith.andi(same, below))
    of_expert = element(next_, expert)
    base = llvm.load(i32(), of_expert, alignment=4)
    sync_warp()
    args = [llvm.ptrtoint(i32(), of_expert), arith.addi(base, math.ctpop(same)), earlier]
    text = "{ .reg .pred p; setp.eq.u32 p, $2, 0; @p st.shared.b32 [$0], $1; }"
    llvm.inline_asm(None, args, text, "r,r,r,~{memory}", has_side_effects=True)
    sync_warp()
    text = "{ .reg .pred p; setp.lt.s32 p, $1, $2; @p st.global.b32 [$0], $1; }"
    args = [element(order, arith.addi(base, earlier)), i, end]
    llvm.inline_asm(None, args, text, "l,r,r,~{memory}", has_side_effects=True)

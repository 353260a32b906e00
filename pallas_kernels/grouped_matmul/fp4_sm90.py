"""Experts with MXFP4 weights on Hopper, for any number of rows: E2M1 codes become E4M3 with their scales folded in.

y[m, n] = sum_b sx[m, b] s[n, b] (x[m, b] . c[n, b]) over blocks b of 128 columns, x and c E4M3, where s is the largest
of the row's four scales in the block and c = w / s, exactly (mosaic/e2m1_folded.py): a product has one scale for every
128 columns of K, as with FP8 weights, and not for every 32. Transposed: 64 weight rows are wgmma's M, tokens its N.
Rows are in blocks of one expert each, and several weights may share their input. Persistent thread blocks take
`warpgroups` x 64 rows of every weight. Tiles of one row block are neighbours: x is read from device memory once.

- The producer copies, a stage, `blocks` K blocks of packed weights, of x and of its scales, and the 16 bytes of a
  row's weight scales that are around them, running ahead across tiles.
- Each consumer has 64 of the rows. It makes tables of their codes for 512 columns, in shared memory. It looks up the
  codes of one K block of one weight at a time, into the registers that wgmma reads its first operand from, while the
  product before runs, and adds products, times the scales of row and token, to float32 sums in the order of K.

Where the four scales of some row and block are further apart than a table holds, 2^11, the warps of a consumer agree
to take the stage in four passes, each with one group of every row and zeros for the others: exact too, and slow. A
token's sum is the same whatever other tokens are present, and however many of them a block has.

Bound: (N K (1/2 + 1/32) + M K + 2 M N) bytes / 3.35 TB/s, or 2 M N K / 1979 TFLOP/s. A consumer warp issues some 37
instructions for 32 columns and 8 tokens, 29 of which look codes up; for 128 columns and 112 tokens some 300, while
wgmma takes 224 cycles for them, and a scheduler has two such warps. Not yet measured.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.pallas.mosaic_gpu.primitives import wgmma_accumulator_load
from jax.typing import DTypeLike

from pallas_kernels.block_matmul.kernel_sm90 import RowBlocks
from pallas_kernels.block_matmul.pipeline_sm90 import BLOCK, COLUMNS, WGMMA_ROWS, produce, swizzled
from pallas_kernels.grouped_matmul import rows_sm90
from pallas_kernels.grouped_matmul.tiling import SCALED, Mxfp4Rows
from pallas_kernels.mosaic import e2m1_folded as e2m1
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.launch import sm_count

LINE = 256  # columns in the 128 bytes of a swizzled row of packed weights, at most
TOKENS = COLUMNS  # the layout of a vector with one element a token
AHEAD = 64  # rows of all weights up to which a product is issued before the last is added: registers hold both


def expert_rows(
    x: jax.Array,
    x_scale: jax.Array,
    weights: Sequence[tuple[jax.Array, jax.Array]],
    tiling: Mxfp4Rows,
    *,
    rows: int,
    out_dtype: DTypeLike,
    row_blocks: RowBlocks,
    factors: jax.Array | None = None,
    epilogue: Callable[..., jax.Array] = lambda sums, factors: sums,
) -> jax.Array:
    """y [M, N]: `epilogue` of the products of x [M, K] with every weight, for M / rows blocks of rows.

    x, x_scale: of all blocks or of the one that they share, as rows_sm90 arranges them. weights: pairs of packed codes
    uint8 [E, N, K/2], low nibble first, and UE8M0 scales uint8 [E, N, K/32]; row blocks that are not real are not
    written. factors float32 [M], or [M / rows] of whole blocks: for the epilogue, which gets the float32 sums
    [64, rows] of each weight (tokens last) and the factors [rows] of its tokens (None without). K is a multiple of 512,
    N of the rows of a tile, rows of 8.
    """
    k, n, m = x.shape[1], weights[0][0].shape[-2], rows * len(row_blocks.expert)
    stages, warpgroups, depth, parts = tiling.stages, tiling.warpgroups, tiling.blocks * BLOCK, tiling.parts
    rows_each, count, cluster = tiling.rows, len(weights), tiling.cluster
    tiles, steps, line = n // rows_each, k // depth, min(depth, LINE)
    assert (rows % 8, n % (rows_each * cluster), k % SCALED) == (0, 0, 0), f"{(m, rows, n, k)} in tiles of {tiling}"
    assert len(x) in (m, rows) and x_scale.shape == rows_sm90.scales_shape(len(x), rows, k), f"x {x.shape} of {m} rows"
    slabs = [(j, p) for j in range(count) for p in range(parts)]  # 64 rows of a weight each, of one consumer
    behind = 1 if rows * len(slabs) <= AHEAD else 0
    transposed = jnp.dtype(out_dtype).itemsize != 2  # of registers, only halves are transposed on their way out
    of_blocks = factors is not None and len(factors) < m
    neighbours: dict[str, Any] = {"cluster": (cluster,), "cluster_names": ("block",)} if cluster > 1 else {}

    def kernel(x_gmem, x_scale_gmem, w_gmems, w_scale_gmems, expert_gmem, count_gmem, factors_gmem, y_gmem, **scratch):
        x_smem, x_scale_smem, w_smem, w_scale_smem = (scratch[name] for name in ("x", "x_scale", "w", "w_scale"))
        y_smem, filled, free, staged_smem = (scratch[name] for name in ("y", "filled", "free", "staged"))
        warpgroup = lax.axis_index("warpgroup")
        loop = {"grid": (count_gmem[0], tiles // cluster), "collective_axes": "sm", "init_carry": jnp.int32(0)}

        def tile_of(info: plgpu.NDLoopInfo) -> tuple[jax.Array, jax.Array]:
            block, tile = info.index
            return block, tile if cluster == 1 else tile * cluster + lax.axis_index("block")

        @pl.when(warpgroup == warpgroups)
        def _produce():
            # The interpreter has no copies to all thread blocks of a cluster; there each copies the whole.
            shared = "block" if cluster > 1 and not is_interpreted() else None

            def copy(info, i, slot):
                block, tile = tile_of(info)
                expert, rows_gmem = expert_gmem[block], pl.ds(tile * rows_each, rows_each)
                of_x = 0 if len(x) < m else block
                tokens, columns = pl.ds(of_x * rows, rows), pl.ds(i * depth, depth)
                plgpu.copy_gmem_to_smem(
                    x_gmem.at[tokens, columns], x_smem.at[slot], filled.at[slot], collective_axes=shared
                )
                copied = [(x_scale_gmem.at[of_x, pl.ds(i * tiling.blocks, tiling.blocks)], x_scale_smem.at[slot])]
                packed = pl.ds(i * (depth // 2), depth // 2)
                around = pl.ds(lax.div(i * depth, SCALED) * (SCALED // e2m1.GROUP), SCALED // e2m1.GROUP)
                for gmems, smem, columns in ((w_gmems, w_smem, packed), (w_scale_gmems, w_scale_smem, around)):
                    copied += [(gmem.at[expert, rows_gmem, columns], smem.at[slot, j]) for j, gmem in enumerate(gmems)]
                for source, target in copied:
                    plgpu.copy_gmem_to_smem(source, target, filled.at[slot])

            produce(loop, steps, stages, free, copy)

        @pl.when(warpgroup < warpgroups)
        def consume():
            plgpu.set_max_registers(tiling.registers, action="increase")
            rows_smem = [pl.ds((warpgroup * parts + p) * WGMMA_ROWS, WGMMA_ROWS) for p in range(parts)]
            tables_smem = [scratch["tables"].at[warpgroup, at] for at in range(len(slabs))]
            staged = None if staged_smem is None else staged_smem.at[warpgroup]
            # K blocks of a stage by line and weight, so that a line of packed codes is loaded once and x is near.
            order = [
                (at, b)
                for first in range(0, tiling.blocks, line // BLOCK)
                for at in range(len(slabs))
                for b in range(first, first + line // BLOCK)
            ]

            if tiling.in_turn:
                pl.when(warpgroup == warpgroups - 1)(lambda: plgpu.barrier_arrive(scratch["turn"].at[0]))

            def look_up(slot, first_block, at, b):
                (j, p), of_line = slabs[at], b % (line // BLOCK)
                columns = pl.ds(b * BLOCK // 2 - of_line * BLOCK // 2, line // 2)
                packed = e2m1.load_packed(w_smem.at[slot, j, rows_smem[p], columns])
                tables, scales = e2m1.load_tables(tables_smem[at], first_block + b)
                return e2m1.look_up(packed, of_line, tables), scales

            def one_by_one(slot, first_block, sums, in_turn):
                sums = list(sums)
                for at, b in order:
                    codes, scales = look_up(slot, first_block, at, b)
                    columns = x_smem.at[slot, :, pl.ds(b * BLOCK, BLOCK)].T

                    def product(accumulator, codes=codes, columns=columns):
                        e2m1.multiply(accumulator, codes, columns, staged)
                        if in_turn:
                            plgpu.barrier_arrive(scratch["turn"].at[lax.rem(warpgroup + 1, warpgroups)])
                        return wgmma_accumulator_load(accumulator, wait_n=0)

                    if in_turn:
                        plgpu.barrier_wait(scratch["turn"].at[warpgroup])
                    found = pl.run_scoped(product, plgpu.ACC((WGMMA_ROWS, rows), jnp.float32))
                    of_tokens = plgpu.load(x_scale_smem.at[slot, b, pl.ds(0, rows)], layout=TOKENS)
                    sums[at] = sums[at] + found * e2m1.scale_product(scales, of_tokens)
                return tuple(sums)

            def multiply(slot, first_block, group, sums, *accumulators):
                """Adds to the sums of each slab its products with a stage of x, by the tables that are there."""
                sums, packed, scales = list(sums), {}, {}

                def look_up(at, b):
                    (j, p), of_line = slabs[at], b % (line // BLOCK)
                    if of_line == 0:
                        columns = pl.ds(b * BLOCK // 2, line // 2)
                        packed[at] = e2m1.load_packed(w_smem.at[slot, j, rows_smem[p], columns])
                    tables, scales[at, b] = e2m1.load_tables(tables_smem[at], first_block + b)
                    return e2m1.look_up(packed[at], of_line, tables)

                codes = look_up(*order[0])
                for at in range(len(order) + behind):
                    if at < len(order):
                        columns = x_smem.at[slot, :, pl.ds(order[at][1] * BLOCK, BLOCK)].T
                        e2m1.multiply(accumulators[at], codes, columns, staged)
                    if at + 1 < len(order):
                        codes = look_up(*order[at + 1])
                    if (done := at - behind) >= 0:
                        of, b = order[done]
                        product = wgmma_accumulator_load(accumulators[done], wait_n=min(behind, len(order) - 1 - done))
                        of_tokens = plgpu.load(x_scale_smem.at[slot, b, pl.ds(0, rows)], layout=TOKENS)
                        sums[of] = sums[of] + product * e2m1.scale_product(scales[of, b], of_tokens)
                return tuple(sums)

            @plgpu.nd_loop(**loop)
            def _tiles(info, carry):
                block, tile = tile_of(info)
                tokens = pl.ds(block * rows, rows)

                def step(i, state):
                    """beyond: whether scales of these 512 columns are too far apart for one pass."""
                    beyond, sums = state
                    slot = lax.rem(carry + i, stages)
                    plgpu.barrier_wait(filled.at[slot])
                    scales_smem = [w_scale_smem.at[slot, j, rows_smem[p]] for j, p in slabs]
                    inside = lax.rem(i, SCALED // depth)  # of the columns whose scales are there
                    beyond = lax.cond(inside == 0, lambda: e2m1.any_beyond(scales_smem), lambda: beyond)

                    def one_pass(group, sums, in_turn=False):
                        @pl.when((inside == 0) & (beyond == 0))
                        def _folded():
                            for tables, scales in zip(tables_smem, scales_smem, strict=True):
                                e2m1.store_folded_tables(tables, scales)

                        @pl.when(beyond != 0)
                        def _of_one():
                            for tables, scales in zip(tables_smem, scales_smem, strict=True):
                                e2m1.store_tables_of_one(tables, scales, group)

                        if tiling.serial:
                            return one_by_one(slot, inside * tiling.blocks, sums, in_turn)
                        # The last to be made is written zeros, the others are not: it is a small one, and unused.
                        shapes = [(WGMMA_ROWS, rows)] * len(order) + [(WGMMA_ROWS, 8)]
                        fresh = [plgpu.ACC(shape, jnp.float32) for shape in shapes]
                        return pl.run_scoped(functools.partial(multiply, slot, inside * tiling.blocks, group, sums), *fresh)

                    first = 0
                    if tiling.in_turn:
                        sums, first = one_pass(0, sums, True), 1
                    sums = lax.fori_loop(first, 1 + (e2m1.GROUPS - 1) * beyond, one_pass, sums)
                    plgpu.commit_smem()  # this warpgroup has read the buffers, and not only through wgmma
                    plgpu.barrier_arrive(free.at[slot])
                    return beyond, sums

                zero = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, rows), jnp.float32), plgpu.Layout.WGMMA)
                _, sums = lax.fori_loop(0, steps, step, (jnp.int32(0), (zero,) * len(slabs)))
                of_rows = None
                if of_blocks:
                    of_rows = plgpu.layout_cast(lax.broadcast_in_dim(factors_gmem[block], (rows,), ()), TOKENS)
                elif factors_gmem is not None:
                    of_rows = plgpu.load(factors_gmem.at[tokens], layout=TOKENS, optimized=False)
                for p in range(parts):
                    y = epilogue(*(total * e2m1.UNIT for total in sums[p::parts]), of_rows).astype(out_dtype)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    columns = pl.ds(tile * rows_each + (warpgroup * parts + p) * WGMMA_ROWS, WGMMA_ROWS)
                    if transposed:
                        y_smem[warpgroup] = y
                        target = y_gmem.at[columns, tokens]
                    else:
                        y_smem.at[warpgroup].T[...] = y
                        target = y_gmem.at[tokens, columns]
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(y_smem.at[warpgroup], target)
                return carry + steps

            if tiling.in_turn:
                pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(scratch["turn"].at[0]))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    halves = plgpu.TilingTransform((8, line // 2)), plgpu.SwizzleTransform(line // 2)
    staged = plgpu.SMEM((warpgroups, WGMMA_ROWS, BLOCK), x.dtype, transforms=swizzled(1))
    free: Any = plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages)
    if cluster > 1:
        free = plgpu.ClusterBarrier(collective_axes=("block",), num_arrivals=warpgroups, num_barriers=stages)
    y = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((n, m) if transposed else (m, n), out_dtype),
        grid=(min(sm_count(), tiles * (m // rows)) // cluster,),
        grid_names=("sm",),
        **neighbours,
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types={
            "x": plgpu.SMEM((stages, rows, depth), x.dtype, transforms=swizzled(1)),
            "x_scale": plgpu.SMEM((stages, tiling.blocks, x_scale.shape[-1]), x_scale.dtype),
            "w": plgpu.SMEM((stages, count, rows_each, depth // 2), jnp.uint8, transforms=halves),
            "w_scale": plgpu.SMEM((stages, count, rows_each, SCALED // e2m1.GROUP), jnp.uint8),
            "y": plgpu.SMEM((warpgroups, *((WGMMA_ROWS, rows) if transposed else (rows, WGMMA_ROWS))), out_dtype),
            "tables": plgpu.SMEM((warpgroups, len(slabs), WGMMA_ROWS, e2m1.TABLE_WORDS), jnp.int32),
            "staged": staged if is_interpreted() else None,
            "filled": plgpu.Barrier(num_arrivals=2 + 2 * count, num_barriers=stages),
            "free": free,
            **({"turn": plgpu.Barrier(num_arrivals=1, num_barriers=warpgroups)} if tiling.in_turn else {}),
        },
    )(
        x, x_scale, [w for w, _ in weights], [scale for _, scale in weights], *row_blocks, factors,
    )  # fmt: skip
    return y.T if transposed else y


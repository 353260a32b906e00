"""Block-scaled FP8 matmul for many rows on Hopper: y[m, n] = sum_b sa[m, b] sb[n/128, b] (a[m, b] . w[n, b]).

a [M, K] and w [N, K] are E4M3; b runs over the blocks of 128 along K. One persistent thread block an SM takes output
tiles in an order that keeps their operands in the L2 cache. Three warpgroups:

- the producer runs ahead, across tiles, and copies one K block of both operands (TMA, 128-byte swizzle) into each of
  `stages` buffers;
- two consumers share the tile, half its rows or half its columns each. For every K block a consumer issues one wgmma a
  64 rows into a fresh accumulator, and while the next one runs adds the finished one, times the two scales, to float32
  sums: tensor cores accumulate E4M3 products in fewer bits than float32 has, so that no chain is longer than 128.
  Scales come straight from device memory, one block ahead.

Bound: 2 M N K / 1979 TFLOP/s of FP8 wgmma. A consumer adds 64 x 128 / 128 = 64 products a thread for every 256 cycles
of wgmma, which the other consumer's wgmma covers.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.pallas.mosaic_gpu.primitives import wgmma_accumulator_load
from jax.typing import DTypeLike

from pallas_kernels.block_matmul.tiling import ManyRows
from pallas_kernels.mosaic.launch import sm_count
from pallas_kernels.mosaic.scales import scale_product

BLOCK = 128  # of K, and rows of a weight scale
WGMMA_ROWS = 64
CONSUMERS = 2


def matmul(
    a: jax.Array,
    a_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    tiling: ManyRows,
    out_dtype: DTypeLike = jnp.bfloat16,
) -> jax.Array:
    """y [M, N] of a [M, K], a_scale [M, K/128], w [N, K], w_scale [N/128, K/128]; scales uint8 (UE8M0) or float32.

    M and N are multiples of the tile, K of 128.
    """
    (m, k), n = a.shape, w.shape[0]
    tile_m, tile_n, stages = tiling.tile_m, tiling.tile_n, tiling.stages
    by_rows = tiling.split == "rows"
    rows_each, columns_each = (tile_m // CONSUMERS, tile_n) if by_rows else (tile_m, tile_n // CONSUMERS)
    parts = rows_each // WGMMA_ROWS
    grid, steps = (m // tile_m, n // tile_n), k // BLOCK
    assert (m % tile_m, n % tile_n, k % BLOCK) == (0, 0, 0), f"{(m, n, k)} in tiles of {tiling}"

    def kernel(a_gmem, a_scale_gmem, w_gmem, w_scale_gmem, y_gmem, a_smem, w_smem, y_smem, filled, free):
        warpgroup = lax.axis_index("warpgroup")

        def tile_of(info: plgpu.NDLoopInfo) -> tuple[jax.Array, jax.Array]:
            return plgpu.planar_snake(info.index[0], grid, 0 if tiling.rows_first else 1, tiling.width)

        @pl.when(warpgroup == CONSUMERS)
        def produce():
            plgpu.set_max_registers(40, action="decrease")

            @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="sm", init_carry=jnp.int32(0))
            def total(info, carry):
                row, column = tile_of(info)
                rows, columns = pl.ds(row * tile_m, tile_m), pl.ds(column * tile_n, tile_n)

                @pl.loop(0, steps)
                def _step(i):
                    slot = lax.rem(carry + i, stages)
                    pl.when(carry + i >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    block = pl.ds(i * BLOCK, BLOCK)
                    plgpu.copy_gmem_to_smem(a_gmem.at[rows, block], a_smem.at[slot], filled.at[slot])
                    plgpu.copy_gmem_to_smem(w_gmem.at[columns, block], w_smem.at[slot], filled.at[slot])

                return carry + steps

            drain(free, total, stages)

        @pl.when(warpgroup < CONSUMERS)
        def consume():
            plgpu.set_max_registers(232, action="increase")
            first_row = warpgroup * rows_each if by_rows else 0
            first_column = 0 if by_rows else warpgroup * columns_each
            columns_smem = pl.ds(first_column, columns_each)

            @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="sm", init_carry=jnp.int32(0))
            def _tiles(info, carry):
                row, column = tile_of(info)
                row_gmem, column_gmem = row * tile_m + first_row, column * tile_n + first_column

                def scales_of(i: Any) -> tuple[jax.Array, ...]:
                    of_weight = w_scale_gmem[column_gmem // BLOCK, i]
                    of_rows = (
                        plgpu.load(
                            a_scale_gmem.at[pl.ds(row_gmem + p * WGMMA_ROWS, WGMMA_ROWS), i],
                            layout=plgpu.Layout.WGMMA.reduce(1),
                            optimized=False,
                        )
                        for p in range(parts)
                    )
                    return tuple(scale_product(scale, of_weight) for scale in of_rows)

                def step(i, state):
                    scales, sums = state
                    slot = lax.rem(carry + i, stages)
                    plgpu.barrier_wait(filled.at[slot])
                    following = scales_of(jnp.minimum(i + 1, steps - 1))

                    def multiply(*accumulators):
                        for p, accumulator in enumerate(accumulators):
                            rows_smem = pl.ds(first_row + p * WGMMA_ROWS, WGMMA_ROWS)
                            plgpu.wgmma(accumulator, a_smem.at[slot, rows_smem], w_smem.at[slot, columns_smem].T)
                        added = []
                        for p, accumulator in enumerate(accumulators):
                            product = wgmma_accumulator_load(accumulator, wait_n=parts - 1 - p)
                            added.append(sums[p] + product * lax.broadcast_in_dim(scales[p], product.shape, [0]))
                        return tuple(added)

                    fresh = [plgpu.ACC((WGMMA_ROWS, columns_each), jnp.float32)] * parts
                    sums = pl.run_scoped(multiply, *fresh)
                    plgpu.barrier_arrive(free.at[slot])
                    return following, sums

                zero = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, columns_each), jnp.float32), plgpu.Layout.WGMMA)
                _, sums = lax.fori_loop(0, steps, step, (scales_of(0), (zero,) * parts))
                for p, part in enumerate(sums):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    y_smem[warpgroup] = part.astype(out_dtype)
                    plgpu.commit_smem()
                    to = pl.ds(row_gmem + p * WGMMA_ROWS, WGMMA_ROWS), pl.ds(column_gmem, columns_each)
                    plgpu.copy_smem_to_gmem(y_smem.at[warpgroup], y_gmem.at[*to])
                return carry + steps

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    operand, result = swizzled(1), swizzled(jnp.dtype(out_dtype).itemsize)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((m, n), out_dtype),
        grid=(min(sm_count(), grid[0] * grid[1]),),
        grid_names=("sm",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types={
            "a_smem": plgpu.SMEM((stages, tile_m, BLOCK), a.dtype, transforms=operand),
            "w_smem": plgpu.SMEM((stages, tile_n, BLOCK), w.dtype, transforms=operand),
            "y_smem": plgpu.SMEM((CONSUMERS, WGMMA_ROWS, columns_each), out_dtype, transforms=result),
            "filled": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        },
    )(a, a_scale, w, w_scale)


def drain(free: Any, total: jax.Array, stages: int) -> None:
    """Waits until the buffers of the last steps are read: every phase of a barrier that completes is observed."""

    @pl.loop(0, stages)
    def _wait(i):
        step = total - stages + i
        pl.when(step >= 0)(lambda: plgpu.barrier_wait(free.at[lax.rem(step, stages)]))


def swizzled(itemsize: int) -> tuple[Any, ...]:
    """Shared-memory layout of a tile that wgmma or TMA reads: 128-byte swizzle over rows of 128 bytes."""
    return plgpu.TilingTransform((8, 128 // itemsize)), plgpu.SwizzleTransform(128)

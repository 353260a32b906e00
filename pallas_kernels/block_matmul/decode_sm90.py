"""Block-scaled FP8 matmul for few rows on Hopper: every weight is read once, at the speed of memory.

The same product as kernel_sm90.py with M <= 64, transposed: 64 weight rows are wgmma's M, the tokens its N, so that no
tensor core works on padding and an accumulator is a few registers. Persistent thread blocks take `warpgroups` x 64
weight rows each:

- the producer copies `blocks` K blocks of weights and of x a stage, running ahead across tiles: what hides the latency
  of memory is the bytes in flight, stages x warpgroups x 64 x blocks x 128;
- each consumer has 64 of the rows. It issues the wgmmas of all K blocks of a stage into accumulators of their own,
  then adds them, times the scales of weight block and token, to float32 sums in K order.

A token's sum is the same whatever other tokens are present: no split along K, no atomics.
Bound: (N K + M K + 2 M N) bytes / 3.35 TB/s and about 2 us of launch and latency.
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

from pallas_kernels.block_matmul.kernel_sm90 import BLOCK, WGMMA_ROWS, drain, swizzled
from pallas_kernels.block_matmul.tiling import FewRows
from pallas_kernels.mosaic.launch import sm_count
from pallas_kernels.mosaic.scales import scale_product


def matmul(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    tiling: FewRows,
    out_dtype: DTypeLike = jnp.bfloat16,
) -> jax.Array:
    """y [M, N] of x [M, K], x_scale [K/128, M] (tokens last), w [N, K], w_scale [N/128, K/128].

    M is a multiple of 8 (wgmma's N), N of 64 x warpgroups, K of 128 x blocks. Scales uint8 (UE8M0) or float32.
    """
    (m, k), n = x.shape, w.shape[0]
    stages, warpgroups, blocks = tiling.stages, tiling.warpgroups, tiling.blocks
    rows_each, depth = WGMMA_ROWS * warpgroups, blocks * BLOCK
    tiles, steps = n // rows_each, k // depth
    assert (m % 8, n % rows_each, k % depth) == (0, 0, 0), f"{(m, n, k)} in tiles of {tiling}"

    def kernel(x_gmem, x_scale_gmem, w_gmem, w_scale_gmem, y_gmem, x_smem, w_smem, y_smem, filled, free):
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == warpgroups)
        def produce():
            plgpu.set_max_registers(40, action="decrease")

            @plgpu.nd_loop((tiles,), collective_axes="sm", init_carry=jnp.int32(0))
            def total(info, carry):
                rows = pl.ds(info.index[0] * rows_each, rows_each)

                @pl.loop(0, steps)
                def _step(i):
                    slot = lax.rem(carry + i, stages)
                    pl.when(carry + i >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    columns = pl.ds(i * depth, depth)
                    plgpu.copy_gmem_to_smem(w_gmem.at[rows, columns], w_smem.at[slot], filled.at[slot])
                    plgpu.copy_gmem_to_smem(x_gmem.at[:, columns], x_smem.at[slot], filled.at[slot])

                return carry + steps

            drain(free, total, stages)

        @pl.when(warpgroup < warpgroups)
        def consume():
            plgpu.set_max_registers(tiling.registers, action="increase")
            rows_smem = pl.ds(warpgroup * WGMMA_ROWS, WGMMA_ROWS)

            @plgpu.nd_loop((tiles,), collective_axes="sm", init_carry=jnp.int32(0))
            def _tiles(info, carry):
                row = info.index[0] * rows_each + warpgroup * WGMMA_ROWS

                def scales_of(i: Any) -> tuple[jax.Array, ...]:
                    found = []
                    for j in range(blocks):
                        of_tokens = plgpu.load(
                            x_scale_gmem.at[i * blocks + j], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False
                        )
                        found.append(scale_product(of_tokens, w_scale_gmem[row // BLOCK, i * blocks + j]))
                    return tuple(found)

                def step(i, state):
                    scales, sums = state
                    slot = lax.rem(carry + i, stages)
                    plgpu.barrier_wait(filled.at[slot])
                    following = scales_of(jnp.minimum(i + 1, steps - 1))

                    def multiply(*accumulators):
                        for j, accumulator in enumerate(accumulators):
                            block = pl.ds(j * BLOCK, BLOCK)
                            plgpu.wgmma(accumulator, w_smem.at[slot, rows_smem, block], x_smem.at[slot, :, block].T)
                        added = sums
                        for j, accumulator in enumerate(accumulators):
                            product = wgmma_accumulator_load(accumulator, wait_n=blocks - 1 - j)
                            added = added + product * lax.broadcast_in_dim(scales[j], product.shape, [1])
                        return added

                    sums = pl.run_scoped(multiply, *[plgpu.ACC((WGMMA_ROWS, m), jnp.float32)] * blocks)
                    plgpu.barrier_arrive(free.at[slot])
                    return following, sums

                zero = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, m), jnp.float32), plgpu.Layout.WGMMA)
                _, sums = lax.fori_loop(0, steps, step, (scales_of(0), zero))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                y_smem.at[warpgroup].T[...] = sums.astype(out_dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(y_smem.at[warpgroup], y_gmem.at[:, pl.ds(row, WGMMA_ROWS)])
                return carry + steps

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((m, n), out_dtype),
        grid=(min(sm_count(), tiles),),
        grid_names=("sm",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types={
            "x_smem": plgpu.SMEM((stages, m, depth), x.dtype, transforms=swizzled(1)),
            "w_smem": plgpu.SMEM((stages, rows_each, depth), w.dtype, transforms=swizzled(1)),
            "y_smem": plgpu.SMEM((warpgroups, m, WGMMA_ROWS), out_dtype),
            "filled": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        },
    )(x, x_scale, w, w_scale)

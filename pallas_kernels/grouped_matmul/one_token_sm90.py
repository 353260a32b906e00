"""FP8 products of one token's experts on Hopper, from the row as it is: it is quantised by who multiplies it.

y[j] = epilogue(w[e_j] x), or y = sum_j w[e_j] x_j, for the k experts e_j that the router has found. The kernel for few
rows (block_matmul/decode_sm90.py) without what it needs beside: quantising x is no launch of its own, and neither is
adding experts up, as that is one product whose K is k times as long.

Persistent thread blocks take `warpgroups` x 64 rows of every weight:

- the producer copies `blocks` K blocks of the weights a stage, running ahead across tiles and experts;
- the consumers quantise the row, or the part of it that their thread block multiplies, while the first weights are on
  their way (own_row_sm90.py). Then each multiplies its 64 weight rows (wgmma's M) by it (of N = 8 the first), adds
  K blocks times their scales in float32 in the order of experts and K, and stores one column.

Thread blocks of a cluster may share out K (block_matmul/split_k.py). Bound: k N K bytes a weight / 3.35 TB/s, and the
latency of a launch, of the row and of sums between thread blocks. Measured within whole layers, see
one_token_layer_sm90.py.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_matmul.decode_sm90 import over_stages
from pallas_kernels.block_matmul.pipeline_sm90 import BLOCK, WGMMA_ROWS, produce, swizzled
from pallas_kernels.block_matmul.split_k import Shares
from pallas_kernels.block_matmul.tiling import FewRows
from pallas_kernels.grouped_matmul.one_token_tiling import ROWS
from pallas_kernels.grouped_matmul.one_token_work_sm90 import Work
from pallas_kernels.grouped_matmul.own_row_sm90 import OwnRow
from pallas_kernels.mosaic.scales import scale_bits, scale_product


def product(work: Work, tiling: FewRows) -> jax.Array:
    """bfloat16 [k, N], or [1, N] where products are added, of codes [E, N, K] and scales [E, N/128, K/128].

    Scales are uint8 (UE8M0) or float32.
    """
    stages, warpgroups, blocks = tiling.stages, tiling.warpgroups, tiling.blocks
    rows_each, depth, count = WGMMA_ROWS * warpgroups, blocks * BLOCK, len(work.weights)
    cut = work.cut(rows_each, depth, tiling.shares)
    shares = Shares(tiling.shares, count, WGMMA_ROWS, ROWS, warpgroups, cut.clusters)
    own = OwnRow(cut.steps, blocks, warpgroups, work.form)

    def kernel(row_gmem, expert_gmem, w_gmems, w_scale_gmems, factors_gmem, y_gmem, *exchanged, **scratch):
        w_smem, filled, free = (scratch[name] for name in ("w", "filled", "free"))
        warpgroup = lax.axis_index("warpgroup")
        first_step, loop = cut.first_step, cut.loop
        place = functools.partial(cut.place, expert_gmem, first_step)

        @pl.when(warpgroup == warpgroups)
        def _produce():
            def copy(info, i, slot):
                result, tile = info.index
                expert, step = place(result, i)
                rows_gmem, columns = pl.ds(tile * rows_each, rows_each), pl.ds(step * depth, depth)
                for j, w_gmem in enumerate(w_gmems):
                    source = w_gmem.at[expert, rows_gmem, columns]
                    plgpu.copy_gmem_to_smem(source, w_smem.at[slot, j], filled.at[slot])

            produce(loop, cut.steps, stages, free, copy)

        @pl.when(warpgroup < warpgroups)
        def consume():
            plgpu.set_max_registers(tiling.registers, action="increase")
            own.quantise(row_gmem, first_step * blocks, scratch)
            rows_smem = pl.ds(warpgroup * WGMMA_ROWS, WGMMA_ROWS)

            @plgpu.nd_loop(**loop)
            def _tiles(info, carry):
                result, tile = info.index
                row = tile * rows_each + warpgroup * WGMMA_ROWS

                def scales_of(i: Any) -> tuple[tuple[jax.Array, ...], ...]:
                    (expert, step), found = place(result, i), []
                    for b in range(blocks):
                        of_row = own.scales(scratch, i * blocks + b)
                        of_weights = (
                            scale_bits(gmem[expert, row // BLOCK, step * blocks + b]) for gmem in w_scale_gmems
                        )
                        found.append(tuple(scale_product(of_row, scale) for scale in of_weights))
                    return tuple(found)

                def operands(i, slot, j, columns):
                    return w_smem.at[slot, j, rows_smem, columns], scratch["row"].at[i, :, columns]

                zero = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, ROWS), jnp.float32), plgpu.Layout.WGMMA)
                sums = over_stages((zero,) * count, operands, scales_of, blocks, cut.steps, carry, filled, free)

                def finish(sums):
                    work.write(sums, factors_gmem, result, row, y_gmem)

                shares.add_up(sums, exchanged, scratch, finish)
                return carry + cut.steps

    scratch = {
        "w": plgpu.SMEM((stages, count, rows_each, depth), work.weights[0][0].dtype, transforms=swizzled(1)),
        "filled": plgpu.Barrier(num_arrivals=count, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        **own.scratch(),
    }
    return work.launch(kernel, cut, shares, warpgroups, scratch)

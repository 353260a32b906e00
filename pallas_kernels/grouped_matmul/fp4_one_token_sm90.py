"""MXFP4 products of one token's experts on Hopper, from the row as it is: one_token_sm90.py for packed weights.

Codes are spread to E4M3 and every 32 columns multiplied apart, as fp4_sm90.py does it for few rows. Teams of `turns`
consumers have the same 64 rows of every weight and take stages by turns; thread blocks of a cluster share out K. So
sums are added in the order of K within a consumer, then of turns, then of shares.

Bound: k N K (1/2 + 1/32) bytes a weight / 3.35 TB/s, and the latencies that one_token_sm90.py names.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_matmul.pipeline_sm90 import BLOCK, WGMMA_ROWS, produce
from pallas_kernels.block_matmul.split_k import Shares
from pallas_kernels.grouped_matmul.fp4_products_sm90 import LINE, Products, Slab, Tokens
from pallas_kernels.grouped_matmul.one_token_tiling import ROWS, SCALE_WORDS, Mxfp4Token
from pallas_kernels.grouped_matmul.one_token_work_sm90 import Work
from pallas_kernels.grouped_matmul.own_row_sm90 import OwnRow
from pallas_kernels.grouped_matmul.tiling import GROUP, SCALED
from pallas_kernels.grouped_matmul.turns_sm90 import Turns
from pallas_kernels.mosaic.e2m1_apart import UNIT


def product(work: Work, tiling: Mxfp4Token) -> jax.Array:
    """As one_token_sm90.product, of packed codes uint8 [E, N, K/2], low nibble first, and UE8M0 scales [E, N, K/32]."""
    stages, warpgroups, blocks, depth = tiling.stages, tiling.warpgroups, tiling.blocks, tiling.blocks * BLOCK
    rows_each, count, (terms, k) = WGMMA_ROWS * tiling.teams, len(work.weights), work.rows.shape
    cut = work.cut(rows_each, depth, tiling.shares, codes=2)
    shares = Shares(tiling.shares, count, WGMMA_ROWS, ROWS, tiling.teams, cut.clusters, tiling.turns)
    turns = Turns(tiling.teams, tiling.turns, count, ROWS)
    own = OwnRow(cut.steps, blocks, warpgroups, work.form, evens=True)
    whole = SCALED * tiling.shares * tiling.turns
    assert (k % SCALED, terms * k % whole) == (0, 0), f"{(terms, k)} by {tiling}"

    def kernel(row_gmem, expert_gmem, w_gmems, w_scale_gmems, factors_gmem, y_gmem, *exchanged, **scratch):
        w_smem, w_scale_smem, filled, free = (scratch[name] for name in ("w", "w_scale", "filled", "free"))
        warpgroup = lax.axis_index("warpgroup")
        first_step, loop = cut.first_step, cut.loop

        @pl.when(warpgroup == warpgroups)
        def _produce():
            def copy(info, i, slot):
                result, tile = info.index
                expert, step = cut.place(expert_gmem, first_step, result, i)
                rows_gmem, of_codes = pl.ds(tile * rows_each, rows_each), pl.ds(step * (depth // 2), depth // 2)
                around = pl.ds(lax.div(step * depth, SCALED) * (SCALED // GROUP), SCALED // GROUP)
                for gmems, smem, columns in ((w_gmems, w_smem, of_codes), (w_scale_gmems, w_scale_smem, around)):
                    for j, gmem in enumerate(gmems):
                        source = gmem.at[expert, rows_gmem, columns]
                        plgpu.copy_gmem_to_smem(source, smem.at[slot, j], filled.at[slot])

            produce(loop, cut.steps, stages, free, copy)

        @pl.when(warpgroup < warpgroups)
        def consume():
            plgpu.set_max_registers(tiling.registers, action="increase")
            team, turn = turns.team, turns.turn
            held = pl.ds(team * WGMMA_ROWS, WGMMA_ROWS)
            tables = scratch["tables"].at[warpgroup]
            slabs = [Slab(w_smem.at[:, j, held], w_scale_smem.at[:, j, held], tables.at[j]) for j in range(count)]
            products = Products(slabs, None, ROWS, blocks)
            own.quantise(row_gmem, first_step * blocks, scratch)

            @plgpu.nd_loop(**loop)
            def _tiles(info, carry):
                result, tile = info.index

                def step(i, sums):
                    i = i * tiling.turns + turn
                    slot = lax.rem(carry + i, stages)
                    plgpu.barrier_wait(filled.at[slot])
                    inside = lax.rem(i, SCALED // depth)  # of the columns whose scales are there
                    row = Tokens(scratch["row"].at[i], lambda b: own.scales(scratch, i * blocks + b))
                    _, sums = products.apart(slot, row, inside, None, sums)
                    plgpu.commit_smem()  # this warpgroup has read the buffers, and not only through wgmma
                    plgpu.barrier_arrive(free.at[slot])
                    return sums

                def finish(sums):
                    row = (tile * tiling.teams + team) * WGMMA_ROWS
                    sums = [total * UNIT for total in sums]
                    work.write(sums, factors_gmem, result, row, y_gmem)

                zero = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, ROWS), jnp.float32), plgpu.Layout.WGMMA)
                sums = lax.fori_loop(0, cut.steps // tiling.turns, step, (zero,) * count)
                turns.add_up(sums, scratch, lambda sums: shares.add_up(sums, exchanged, scratch, finish))
                return carry + cut.steps

    line = min(depth, LINE) // 2
    halves = plgpu.TilingTransform((8, line)), plgpu.SwizzleTransform(line)
    scratch = {
        "w": plgpu.SMEM((stages, count, rows_each, depth // 2), jnp.uint8, transforms=halves),
        "w_scale": plgpu.SMEM((stages, count, rows_each, SCALED // GROUP), jnp.uint8),
        "tables": plgpu.SMEM((warpgroups, count, WGMMA_ROWS, SCALE_WORDS), jnp.int32),
        "filled": plgpu.Barrier(num_arrivals=2 * count, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=tiling.teams, num_barriers=stages),
        **own.scratch(),
        **turns.scratch(),
    }
    return work.launch(kernel, cut, shares, warpgroups, scratch)

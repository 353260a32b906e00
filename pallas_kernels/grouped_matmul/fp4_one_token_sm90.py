"""MXFP4 products of one token's experts on Hopper, from the row as it is: one_token_sm90.py for packed weights.

Codes are spread to E4M3 and every 32 columns multiplied apart, as fp4_sm90.py does it for few rows. Teams of `turns`
consumers have the same 64 rows of every weight and take stages by turns; thread blocks of a cluster share out K. So
sums are added in the order of K within a consumer, then of turns, then of shares.

Bound: k N K (1/2 + 1/32) bytes a weight / 3.35 TB/s, and the latencies that one_token_sm90.py names.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_matmul.pipeline_sm90 import BLOCK, WGMMA_ROWS, produce
from pallas_kernels.block_matmul.split_k import AXIS, Shares, clusters
from pallas_kernels.formats import QuantFormat
from pallas_kernels.grouped_matmul.fp4_products_sm90 import LINE, Products, Slab, Tokens
from pallas_kernels.grouped_matmul.one_token_sm90 import write
from pallas_kernels.grouped_matmul.one_token_tiling import ROWS, SCALE_WORDS, Mxfp4Token
from pallas_kernels.grouped_matmul.own_row_sm90 import OwnRow
from pallas_kernels.grouped_matmul.tiling import GROUP, SCALED
from pallas_kernels.grouped_matmul.turns_sm90 import Turns
from pallas_kernels.mosaic.e2m1_apart import UNIT


def product(
    rows: jax.Array,
    experts: jax.Array,
    weights: Sequence[tuple[jax.Array, jax.Array]],
    tiling: Mxfp4Token,
    form: QuantFormat,
    *,
    added: bool,
    factors: jax.Array | None = None,
    epilogue: Callable[..., jax.Array] = lambda sums, factors: sums,
) -> jax.Array:
    """As one_token_sm90.product, of packed codes uint8 [E, N, K/2], low nibble first, and UE8M0 scales [E, N, K/32]."""
    (_, n, packed), stages, blocks, depth = weights[0][0].shape, tiling.stages, tiling.blocks, tiling.blocks * BLOCK
    k, terms, count = 2 * packed, len(experts) if added else 1, len(weights)
    results, rows_each, warpgroups = len(experts) // terms, WGMMA_ROWS * tiling.teams, tiling.warpgroups
    tiles, of_term, steps = n // rows_each, k // depth, terms * k // depth // tiling.shares
    launched = clusters(tiling.shares, tiles * results)
    shares = Shares(tiling.shares, count, WGMMA_ROWS, ROWS, tiling.teams, launched, tiling.turns)
    turns = Turns(tiling.teams, tiling.turns, count, ROWS)
    own = OwnRow(steps, blocks, warpgroups, form, evens=True)
    assert rows.shape == (terms, k), f"rows {rows.shape} for {terms} experts [{n}, {k}]"
    whole = SCALED * tiling.shares * tiling.turns
    assert (n % rows_each, k % SCALED, terms * k % whole) == (0, 0, 0), f"{(n, k, terms)} by {tiling}"

    def kernel(row_gmem, expert_gmem, w_gmems, w_scale_gmems, factors_gmem, y_gmem, *exchanged, **scratch):
        w_smem, w_scale_smem, filled, free = (scratch[name] for name in ("w", "w_scale", "filled", "free"))
        warpgroup = lax.axis_index("warpgroup")
        first_step = 0 if tiling.shares == 1 else lax.axis_index(AXIS) * steps
        loop = {"grid": (results, tiles), "collective_axes": "sm", "init_carry": jnp.int32(0)}

        @pl.when(warpgroup == warpgroups)
        def _produce():
            def copy(info, i, slot):
                (result, tile), at = info.index, first_step + i
                expert, step = expert_gmem[result * terms + lax.div(at, of_term)], lax.rem(at, of_term)
                rows_gmem, of_codes = pl.ds(tile * rows_each, rows_each), pl.ds(step * (depth // 2), depth // 2)
                around = pl.ds(lax.div(step * depth, SCALED) * (SCALED // GROUP), SCALED // GROUP)
                for gmems, smem, columns in ((w_gmems, w_smem, of_codes), (w_scale_gmems, w_scale_smem, around)):
                    for j, gmem in enumerate(gmems):
                        source = gmem.at[expert, rows_gmem, columns]
                        plgpu.copy_gmem_to_smem(source, smem.at[slot, j], filled.at[slot])

            produce(loop, steps, stages, free, copy)

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
                    write(sums, factors_gmem, epilogue, result, row, y_gmem)

                zero = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, ROWS), jnp.float32), plgpu.Layout.WGMMA)
                sums = lax.fori_loop(0, steps // tiling.turns, step, (zero,) * count)
                turns.add_up(sums, scratch, lambda sums: shares.add_up(sums, exchanged, scratch, finish))
                return carry + steps

    line = min(depth, LINE) // 2
    halves = plgpu.TilingTransform((8, line)), plgpu.SwizzleTransform(line)
    y, *_ = plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct((results, n), jnp.bfloat16), *shares.outputs()),
        grid=(launched,),
        grid_names=("sm",),
        **shares.launch(),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types={
            "w": plgpu.SMEM((stages, count, rows_each, depth // 2), jnp.uint8, transforms=halves),
            "w_scale": plgpu.SMEM((stages, count, rows_each, SCALED // GROUP), jnp.uint8),
            "tables": plgpu.SMEM((warpgroups, count, WGMMA_ROWS, SCALE_WORDS), jnp.int32),
            "filled": plgpu.Barrier(num_arrivals=2 * count, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=tiling.teams, num_barriers=stages),
            **own.scratch(),
            **turns.scratch(),
            **shares.scratch(),
        },
    )(rows.reshape(-1, BLOCK), experts, [w for w, _ in weights], [scale for _, scale in weights], factors)
    return y

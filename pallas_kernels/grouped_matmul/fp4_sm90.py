"""Experts with MXFP4 weights on Hopper, for any number of rows: E2M1 codes become E4M3 on their way to the tensor core.

y[m, n] = sum_g sx[m, g/4] s[n, g] (x[m, g] . w[n, g]) over groups g of 32 columns, in one of two ways (mosaic/):

- apart (e2m1_apart.py), for few rows: codes are spread to E4M3 by moving their bits, and every 32 columns, one wgmma,
  have an accumulator of their own, which is added times the scales of weight row and token;
- folded (e2m1_folded.py): c = w / s, exactly, with s the largest of the row's four scales in a block of 128 columns, is
  looked up in tables. A block is one accumulator: a quarter of the additions, which many rows need. Where the four
  scales of some row are further apart than a table holds, 2^11, the warps of a consumer agree to take the stage in four
  passes, each with one group of every row and zeros for the others: exact too, and slow.

Transposed: 64 weight rows are wgmma's M, tokens its N. Rows are in blocks of one expert each, and several weights may
share their input. Persistent thread blocks take `warpgroups` x 64 rows of every weight. Tiles of one row block are
neighbours: x is read from device memory once.

- The producer copies, a stage, `blocks` K blocks of packed weights, of x and of its scales, and the 16 bytes of a row's
  weight scales that are around them, running ahead across tiles.
- Each consumer has `parts` slabs of 64 rows of every weight. For 512 columns it makes its scales, or tables, in shared
  memory. It spreads or looks up the codes of one K block of one slab at a time, into the registers that wgmma reads its
  first operand from, and adds products to float32 sums in the order of K (fp4_products_sm90.py). Of few rows, this
  goes on while the product before runs. Of many, sums and one product fill the registers.
- Results leave as rows, or as what the next product takes: codes and their scales (fp4_results_sm90.py).

Where there are few tiles, teams of `shares` consumers have the same rows, and take stages by turns: one waits for
itself most of the time. The first of a team adds the sums of the others, in their order, and finishes the tile. A
token's sum goes by the tiling, not by what other tokens are present or how many of them a block has.

Bound: (N K (1/2 + 1/32) + M K + 2 M N) bytes / 3.35 TB/s, or 2 M N K / 1979 TFLOP/s. Few rows run at the speed of
memory once every multiprocessor has tiles: 256 experts of 3 rows, 4096 -> 4096 / 2048 -> 4096, 547 / 280 us on an H200,
4.2 / 4.1 TB/s (folded 571 / 288). Many do not: of 112 rows, a consumer's warp issues 275 instructions for a product of
64 x 112 x 128, 72 of them integer ones at half rate to look codes up and 112 to add. Two such warps share a scheduler,
and each mostly waits for itself.
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
from jax.typing import DTypeLike

from pallas_kernels.block_matmul.pipeline_sm90 import BLOCK, WGMMA_ROWS, produce, swizzled
from pallas_kernels.block_matmul.row_blocks import RowBlocks
from pallas_kernels.formats import QuantFormat
from pallas_kernels.grouped_matmul import rows_sm90
from pallas_kernels.grouped_matmul.fp4_products_sm90 import LINE, TOKENS, Products, Slab, Tokens
from pallas_kernels.grouped_matmul.fp4_results_sm90 import Codes, Plain
from pallas_kernels.grouped_matmul.tiling import MOST_APART, SCALED, Mxfp4Rows
from pallas_kernels.grouped_matmul.turns_sm90 import Turns
from pallas_kernels.mosaic import e2m1_apart
from pallas_kernels.mosaic import e2m1_folded as e2m1
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.launch import sm_count


def expert_rows(
    x: jax.Array,
    x_scale: jax.Array,
    weights: Sequence[tuple[jax.Array, jax.Array]],
    tiling: Mxfp4Rows,
    *,
    rows: int,
    out_dtype: DTypeLike | QuantFormat,
    row_blocks: RowBlocks,
    next_folded: bool | None = None,
    factors: jax.Array | None = None,
    epilogue: Callable[..., jax.Array] = lambda sums, factors: sums,
) -> Any:
    """y [M, N]: `epilogue` of the products of x [M, K] with every weight, for M / rows blocks of rows.

    x, x_scale: of all blocks or of the one that they share, as rows_sm90 arranges them for a `folded` tiling or not; a
    QuantFormat for out_dtype asks for results in the same form, for a product that is `next_folded` or not. weights:
    pairs of packed codes uint8 [E, N, K/2], low nibble first, and UE8M0 scales uint8 [E, N, K/32]; row blocks that are
    not real are not written. factors float32 [M], or [M / rows] of whole blocks: for the epilogue, which gets the
    float32 sums [64, rows] of each weight (tokens last) and the factors [rows] of its tokens (None without). K is a
    multiple of 512, N of the rows of a tile, rows of 8.
    """
    k, n, m = x.shape[1], weights[0][0].shape[-2], rows * len(row_blocks.expert)
    stages, warpgroups, depth, parts = tiling.stages, tiling.warpgroups, tiling.blocks * BLOCK, tiling.parts
    shares, teams = tiling.shares, tiling.teams
    rows_each, count = tiling.rows, len(weights)
    tiles, steps, line = n // rows_each, k // depth, min(depth, LINE)
    assert (rows % 8, n % rows_each, k % SCALED) == (0, 0, 0), f"{(m, rows, n, k)} in tiles of {tiling}"
    assert shares == 1 or tiling.takes_turns(k), f"{shares} consumers, by turns, for {k} columns"
    assert tiling.folded or rows <= MOST_APART, f"blocks of {rows} rows, every 32 columns apart"
    assert len(x) in (m, rows) and x_scale.shape == rows_sm90.scales_shape(len(x), rows, k), f"x {x.shape} of {m} rows"
    of_tile = m, n, rows, teams, parts
    unit = (e2m1 if tiling.folded else e2m1_apart).UNIT
    assert isinstance(out_dtype, QuantFormat) == (next_folded is not None), "codes have an order, and rows have none"
    as_codes = next_folded is not None
    results = Codes(*of_tile, out_dtype, next_folded) if as_codes else Plain(*of_tile, out_dtype)
    of_blocks = factors is not None and len(factors) < m
    turns = Turns(teams, shares, parts * count, rows)

    def kernel(x_gmem, x_scale_gmem, w_gmems, w_scale_gmems, expert_gmem, count_gmem, factors_gmem, *outs, **scratch):
        x_smem, x_scale_smem, w_smem, w_scale_smem = (scratch[name] for name in ("x", "x_scale", "w", "w_scale"))
        filled, free = scratch["filled"], scratch["free"]
        warpgroup = lax.axis_index("warpgroup")
        team, turn = turns.team, turns.turn
        loop = {"grid": (count_gmem[0], tiles), "collective_axes": "sm", "init_carry": jnp.int32(0)}

        @pl.when(warpgroup == warpgroups)
        def _produce():
            def with_expert(info):
                block, tile = info.index
                return block, tile, expert_gmem[block]

            def copy(found, i, slot):
                block, tile, expert = found
                rows_gmem = pl.ds(tile * rows_each, rows_each)
                of_x = block if len(x) == m else 0
                tokens, columns = pl.ds(of_x * rows, rows), pl.ds(i * depth, depth)
                copied = [(x_gmem.at[tokens, columns], x_smem.at[slot])]
                copied += [(x_scale_gmem.at[of_x, pl.ds(i * tiling.blocks, tiling.blocks)], x_scale_smem.at[slot])]
                packed = pl.ds(i * (depth // 2), depth // 2)
                around = pl.ds(lax.div(i * depth, SCALED) * (SCALED // e2m1.GROUP), SCALED // e2m1.GROUP)
                for gmems, smem, columns in ((w_gmems, w_smem, packed), (w_scale_gmems, w_scale_smem, around)):
                    copied += [(gmem.at[expert, rows_gmem, columns], smem.at[slot, j]) for j, gmem in enumerate(gmems)]
                for source, target in copied:
                    plgpu.copy_gmem_to_smem(source, target, filled.at[slot])

            produce(loop, steps, stages, free, copy, with_expert)

        def slab_of(j: int, p: int) -> Slab:
            held = pl.ds((team * parts + p) * WGMMA_ROWS, WGMMA_ROWS)
            tables = scratch["tables"].at[warpgroup, j * parts + p]
            return Slab(w_smem.at[:, j, held], w_scale_smem.at[:, j, held], tables)

        @pl.when(warpgroup < warpgroups)
        def consume():
            plgpu.set_max_registers(tiling.registers, action="increase")
            slabs = [slab_of(j, p) for j in range(count) for p in range(parts)]
            staged = scratch["staged"].at[warpgroup] if is_interpreted() else None
            products = Products(slabs, staged, rows, tiling.blocks)

            def scales_of(slot, b):
                return plgpu.load(x_scale_smem.at[slot, b, pl.ds(0, rows)], layout=TOKENS)

            def finish(place, sums):
                block, tile = place
                of_rows = None
                if of_blocks:
                    of_rows = plgpu.layout_cast(lax.broadcast_in_dim(factors_gmem[block], (rows,), ()), TOKENS)
                elif factors_gmem is not None:
                    tokens = pl.ds(block * rows, rows)
                    of_rows = plgpu.load(factors_gmem.at[tokens], layout=TOKENS, optimized=False)
                of_parts = [epilogue(*(total * unit for total in sums[p::parts]), of_rows) for p in range(parts)]
                results.write(of_parts, block, tile, team, outs, scratch)

            @plgpu.nd_loop(**loop)
            def _tiles(info, carry):
                def step(i, state):
                    i = i * shares + turn
                    slot = lax.rem(carry + i, stages)
                    plgpu.barrier_wait(filled.at[slot])
                    inside = lax.rem(i, SCALED // depth)  # of the columns whose scales are there
                    tokens = Tokens(x_smem.at[slot], functools.partial(scales_of, slot))
                    state = (products.folded if tiling.folded else products.apart)(slot, tokens, inside, *state)
                    plgpu.commit_smem()  # this warpgroup has read the buffers, and not only through wgmma
                    plgpu.barrier_arrive(free.at[slot])
                    return state

                zero = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, rows), jnp.float32), plgpu.Layout.WGMMA)
                _, sums = lax.fori_loop(0, steps // shares, step, (jnp.int32(0), (zero,) * len(slabs)))
                turns.add_up(sums, scratch, functools.partial(finish, info.index))
                return carry + steps

            results.finish()

    halves = plgpu.TilingTransform((8, line // 2)), plgpu.SwizzleTransform(line // 2)
    scratch_types: dict[str, Any] = {
        "x": plgpu.SMEM((stages, rows, depth), x.dtype, transforms=swizzled(1)),
        "x_scale": plgpu.SMEM((stages, tiling.blocks, x_scale.shape[-1]), x_scale.dtype),
        "w": plgpu.SMEM((stages, count, rows_each, depth // 2), jnp.uint8, transforms=halves),
        "w_scale": plgpu.SMEM((stages, count, rows_each, SCALED // e2m1.GROUP), jnp.uint8),
        "tables": plgpu.SMEM((warpgroups, parts * count, WGMMA_ROWS, tiling.table_words), jnp.int32),
        "filled": plgpu.Barrier(num_arrivals=2 + 2 * count, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=teams, num_barriers=stages),
        **results.scratch(),
        **turns.scratch(),
    }
    if is_interpreted():
        scratch_types["staged"] = plgpu.SMEM((warpgroups, WGMMA_ROWS, BLOCK), x.dtype, transforms=swizzled(1))
    outs = plgpu.kernel(
        kernel,
        out_type=results.outputs(),
        grid=(min(sm_count(), tiles * (m // rows)),),
        grid_names=("sm",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch_types,
    )(x, x_scale, [w for w, _ in weights], [scale for _, scale in weights], *row_blocks, factors)
    return results.result(*outs)

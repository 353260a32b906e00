"""Matmul of few FP8 rows with MXFP4 weights on Hopper: every weight is read once, packed, at the speed of memory.

y[m, n] = sum_g sx[m, g/4] sw[n, g] (x[m, g] . w[n, g]) over the groups g of 32 along K, x E4M3 and w E2M1. Transposed,
as in decode_sm90.py: 64 weight rows are wgmma's M, the tokens its N; rows may be grouped by expert and several weights
may share their input. Hopper multiplies no 4-bit numbers, so that codes become E4M3 on the way, in registers, which
wgmma reads its first operand from. Persistent thread blocks take `warpgroups` x 64 rows of every weight:

- the producer copies, a stage, `blocks` K blocks of packed weights, of their scales and of x, running ahead across
  tiles: what hides the latency of memory is stages x weights x warpgroups x 64 x blocks x 68 bytes in flight;
- each consumer has 64 of the rows. It loads a line of packed weights (256 columns) as wgmma's fragments, unpacks them,
  and issues one wgmma a group into an accumulator of its own, which it adds, times the scales of row and token, to
  float32 sums in the order of K while later ones run. Codes are values * 2^-6: the last product makes up for it.

A token's sum is the same whatever other tokens are present: no split along K, no atomics.
Bound: (N K (1/2 + 1/32) + M K + 2 M N) bytes / 3.35 TB/s and about 2 us of launch and latency. A consumer warp issues
some 45 instructions a group with 8 tokens (14 of them unpack 16 codes a thread), 54 with 16; at 2.6 TB/s of packed
weights one of a scheduler's warps has a group every 90 cycles. An H100 measured 2.47 TB/s, 74 %, for 256 experts of 3
rows and [4096, 4096].
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.pallas.mosaic_gpu.primitives import wgmma_accumulator_load
from jax.typing import DTypeLike

from pallas_kernels.block_matmul.decode_sm90 import TOKENS
from pallas_kernels.block_matmul.kernel_sm90 import RowBlocks
from pallas_kernels.block_matmul.pipeline_sm90 import BLOCK, WGMMA_ROWS, produce, swizzled
from pallas_kernels.block_matmul.tiling import FewRows
from pallas_kernels.mosaic import e2m1
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.launch import sm_count

GROUP = e2m1.STEP  # columns that share a weight scale: one wgmma
LINE = 256  # columns in the 128 bytes of a swizzled row of packed weights
DEPTH = 512  # columns whose scales are the 16 bytes that a copy has at least: a stage is a multiple
IN_FLIGHT = 16  # registers of accumulators behind the one that is issued


def matmul(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    tiling: FewRows,
    out_dtype: DTypeLike = jnp.bfloat16,
) -> jax.Array:
    """y [M, N] of x [M, K], x_scale [K/128, M] (tokens last), w uint8 [N, K/2], w_scale uint8 [N, K/32].

    M is a multiple of 8 (wgmma's N), N of 64 x warpgroups, K of 128 x blocks, blocks of 4. x_scale is uint8 (UE8M0) or
    float32.
    """
    return few_rows(x, x_scale, [(w, w_scale)], tiling, rows=x.shape[0], out_dtype=out_dtype)


def few_rows(
    x: jax.Array,
    x_scale: jax.Array,
    weights: Sequence[tuple[jax.Array, jax.Array]],
    tiling: FewRows,
    *,
    rows: int,
    out_dtype: DTypeLike,
    row_blocks: RowBlocks | None = None,
    factors: jax.Array | None = None,
    epilogue: Callable[..., jax.Array] = lambda sums, factors: sums,
) -> jax.Array:
    """y [M, N]: `epilogue` of the products of x [M, K] with every weight, for M / rows blocks of rows.

    weights: pairs of packed codes uint8 [N, K/2], low nibble first, and UE8M0 scales uint8 [N, K/32], with a leading
    expert axis where `row_blocks` is given; blocks that are not real are not written. factors float32 [M]: for the
    epilogue, which gets the float32 sums [64, rows] of each weight (tokens last) and the factors [rows] of its tokens
    (None without).
    """
    (m, k), n = x.shape, weights[0][0].shape[-2]
    stages, warpgroups, depth = tiling.stages, tiling.warpgroups, tiling.blocks * BLOCK
    rows_each, count = WGMMA_ROWS * warpgroups, len(weights)
    tiles, steps = n // rows_each, k // depth
    assert (m % rows, rows % 8, n % rows_each, k % depth) == (0, 0, 0, 0), f"{(m, rows, n, k)} in tiles of {tiling}"
    assert depth % DEPTH == 0, f"{tiling}: a stage is a multiple of {DEPTH // BLOCK} blocks"
    behind = max(1, IN_FLIGHT * 2 // rows)

    def kernel(x_gmem, x_scale_gmem, w_gmems, w_scale_gmems, expert_gmem, count_gmem, factors_gmem, y_gmem, **scratch):
        x_smem, w_smem, w_scale_smem, y_smem = (scratch[name] for name in ("x", "w", "w_scale", "y"))
        filled, free, staged_smem = (scratch[name] for name in ("filled", "free", "staged"))
        warpgroup = lax.axis_index("warpgroup")
        row_block_count = m // rows if count_gmem is None else count_gmem[0]
        # Row blocks are the inner index: those that share a weight tile run together, and read it from the L2 cache.
        loop = {"grid": (tiles, row_block_count), "collective_axes": "sm", "init_carry": jnp.int32(0)}

        def of_expert(gmem, block):
            return gmem if expert_gmem is None else gmem.at[expert_gmem[block]]

        @pl.when(warpgroup == warpgroups)
        def _produce():
            def copy(info, i, slot):
                tile, block = info.index
                rows_gmem = pl.ds(tile * rows_each, rows_each)
                for gmems, smem, packing in ((w_gmems, w_smem, 2), (w_scale_gmems, w_scale_smem, GROUP)):
                    columns = pl.ds(i * (depth // packing), depth // packing)
                    for j, gmem in enumerate(gmems):
                        source = of_expert(gmem, block).at[rows_gmem, columns]
                        plgpu.copy_gmem_to_smem(source, smem.at[slot, j], filled.at[slot])
                source = x_gmem.at[pl.ds(block * rows, rows), pl.ds(i * depth, depth)]
                plgpu.copy_gmem_to_smem(source, x_smem.at[slot], filled.at[slot])

            produce(loop, steps, stages, free, copy)

        @pl.when(warpgroup < warpgroups)
        def consume():
            plgpu.set_max_registers(tiling.registers, action="increase")
            rows_smem = pl.ds(warpgroup * WGMMA_ROWS, WGMMA_ROWS)
            # All wgmmas of a stage: by line, weight and group, so that x is read while it is near.
            order = [
                (j, g)
                for line in range(0, depth // GROUP, LINE // GROUP)
                for j in range(count)
                for g in range(line, line + LINE // GROUP)
            ]

            @plgpu.nd_loop(**loop)
            def _tiles(info, carry):
                tile, block = info.index
                tokens = pl.ds(block * rows, rows)

                def scales_of(i: Any) -> tuple[jax.Array, ...]:
                    at = (x_scale_gmem.at[i * tiling.blocks + b, tokens] for b in range(tiling.blocks))
                    return tuple(plgpu.load(gmem, layout=TOKENS, optimized=False) for gmem in at)

                def step(i, state):
                    x_scales, sums = state
                    slot = lax.rem(carry + i, stages)
                    plgpu.barrier_wait(filled.at[slot])
                    following = scales_of(jnp.minimum(i + 1, steps - 1))
                    w_scales = [e2m1.load_scales(w_scale_smem.at[slot, j, rows_smem]) for j in range(count)]

                    def multiply(*accumulators):
                        added, codes = list(sums), ()
                        for at in range(len(order) + behind):
                            if at < len(order):
                                j, g = order[at]
                                if g * GROUP % LINE == 0:
                                    line = pl.ds(g * GROUP // 2, LINE // 2)
                                    codes = e2m1.load_codes(w_smem.at[slot, j, rows_smem, line])
                                columns = x_smem.at[slot, :, pl.ds(g * GROUP, GROUP)].T
                                staged = None if staged_smem is None else staged_smem.at[warpgroup]
                                e2m1.multiply(accumulators[at], codes[g % (LINE // GROUP)], columns, staged)
                            if (done := at - behind) >= 0:
                                j, g = order[done]
                                running = min(behind, len(order) - 1 - done)
                                product = wgmma_accumulator_load(accumulators[done], wait_n=running)
                                scale = e2m1.scale_product(w_scales[j][g], x_scales[g * GROUP // BLOCK])
                                added[j] = added[j] + product * scale
                        return tuple(added)

                    fresh = [plgpu.ACC((WGMMA_ROWS, rows), jnp.float32)] * len(order)
                    sums = pl.run_scoped(multiply, *fresh)
                    plgpu.commit_smem()  # this warpgroup has read the buffers, and not only through wgmma
                    plgpu.barrier_arrive(free.at[slot])
                    return following, sums

                zero = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, rows), jnp.float32), plgpu.Layout.WGMMA)
                _, sums = lax.fori_loop(0, steps, step, (scales_of(0), (zero,) * count))
                of_tokens = None
                if factors_gmem is not None:
                    of_tokens = plgpu.load(factors_gmem.at[tokens], layout=TOKENS, optimized=False)
                y = epilogue(*(total * e2m1.UNIT for total in sums), of_tokens).astype(out_dtype)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                y_smem.at[warpgroup].T[...] = y
                plgpu.commit_smem()
                row = tile * rows_each + warpgroup * WGMMA_ROWS
                plgpu.copy_smem_to_gmem(y_smem.at[warpgroup], y_gmem.at[tokens, pl.ds(row, WGMMA_ROWS)])
                return carry + steps

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    expert, real = (None, None) if row_blocks is None else row_blocks
    a_step = plgpu.TilingTransform((8, GROUP)), plgpu.SwizzleTransform(GROUP)  # what one wgmma reads, and no more
    staged = plgpu.SMEM((warpgroups, WGMMA_ROWS, GROUP), x.dtype, transforms=a_step)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((m, n), out_dtype),
        grid=(min(sm_count(), tiles * (m // rows)),),
        grid_names=("sm",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types={
            "x": plgpu.SMEM((stages, rows, depth), x.dtype, transforms=a_step),
            "w": plgpu.SMEM((stages, count, rows_each, depth // 2), jnp.uint8, transforms=swizzled(1)),
            "w_scale": plgpu.SMEM((stages, count, rows_each, depth // GROUP), jnp.uint8),
            "y": plgpu.SMEM((warpgroups, rows, WGMMA_ROWS), out_dtype),
            "staged": staged if is_interpreted() else None,
            "filled": plgpu.Barrier(num_arrivals=1 + 2 * count, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        },
    )(e2m1.even_then_odd(x), x_scale, [w for w, _ in weights], [scale for _, scale in weights], expert, real, factors)

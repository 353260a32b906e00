"""Block-scaled FP8 matmul for many rows on Hopper: y[m, n] = sum_b sa[m, b] sb[n/128, b] (a[m, b] . w[n, b]).

a [M, K] and w [N, K] are E4M3; b runs over the blocks of 128 along K. One persistent thread block an SM takes output
tiles in an order that keeps their operands in the L2 cache. Three warpgroups:

Rows may be grouped by expert, in blocks of tile_m that belong to one expert each, and several weights may share their
input, as the gate and up projections do.

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
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
ROWS = plgpu.Layout.WGMMA.reduce(1)  # of a vector with one element a row of an accumulator


class RowBlocks(NamedTuple):
    """Rows in blocks of one expert each: expert int32 [most blocks], real int32 [1] of them hold rows."""

    expert: jax.Array
    real: jax.Array


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
    return many_rows(a, a_scale, [(w, w_scale)], tiling, out_dtype=out_dtype)


def many_rows(
    a: jax.Array,
    a_scale: jax.Array,
    weights: Sequence[tuple[jax.Array, jax.Array]],
    tiling: ManyRows,
    *,
    out_dtype: DTypeLike,
    row_blocks: RowBlocks | None = None,
    factors: jax.Array | None = None,
    epilogue: Callable[..., jax.Array] = lambda sums, factors: sums,
) -> jax.Array:
    """y [M, N]: `epilogue` of the products of a [M, K] with every weight.

    weights: pairs of codes [N, K] and scales [N/128, K/128], with a leading expert axis where `row_blocks` (of tile_m
    rows) is given; blocks that are not real are not written. Several weights need a tile that is split by rows.
    factors float32 [M]: for the epilogue, which gets the float32 sums [64, columns] of each weight and the factors
    [64] of its rows (None without).
    """
    (m, k), n, count = a.shape, weights[0][0].shape[-2], len(weights)
    tile_m, tile_n, stages = tiling.tile_m, tiling.tile_n, tiling.stages
    by_rows = tiling.split == "rows"
    rows_each, columns_each = (tile_m // CONSUMERS, tile_n) if by_rows else (tile_m, tile_n // CONSUMERS)
    parts, steps, (row_tiles, column_tiles) = rows_each // WGMMA_ROWS, k // BLOCK, (m // tile_m, n // tile_n)
    assert (m % tile_m, n % tile_n, k % BLOCK) == (0, 0, 0), f"{(m, n, k)} in tiles of {tiling}"
    assert by_rows or count == 1, "the consumers of several weights share their columns"

    def kernel(a_gmem, a_scale_gmem, w_gmems, w_scale_gmems, expert_gmem, count_gmem, factors_gmem, y_gmem, **scratch):
        a_smem, w_smem, y_smem, filled, free = (scratch[name] for name in ("a", "w", "y", "filled", "free"))
        warpgroup = lax.axis_index("warpgroup")
        real = row_tiles if count_gmem is None else count_gmem[0]
        loop = {"grid": (real * column_tiles,), "collective_axes": "sm", "init_carry": jnp.int32(0)}

        def tile_of(info: plgpu.NDLoopInfo) -> tuple[jax.Array, jax.Array]:
            if count_gmem is None:
                order = 0 if tiling.rows_first else 1
                return plgpu.planar_snake(info.index[0], (row_tiles, column_tiles), order, tiling.width)
            # Rows of one expert are neighbours: together they read a tile of its weights once.
            return lax.rem(info.index[0], real), lax.div(info.index[0], real)

        def of_expert(gmem, row):
            return gmem if expert_gmem is None else gmem.at[expert_gmem[row]]

        @pl.when(warpgroup == CONSUMERS)
        def _produce():
            def copy(info, i, slot):
                row, column = tile_of(info)
                rows, columns = pl.ds(row * tile_m, tile_m), pl.ds(column * tile_n, tile_n)
                block = pl.ds(i * BLOCK, BLOCK)
                plgpu.copy_gmem_to_smem(a_gmem.at[rows, block], a_smem.at[slot], filled.at[slot])
                for j, w_gmem in enumerate(w_gmems):
                    source = of_expert(w_gmem, row).at[columns, block]
                    plgpu.copy_gmem_to_smem(source, w_smem.at[slot, j], filled.at[slot])

            produce(loop, steps, stages, free, copy)

        @pl.when(warpgroup < CONSUMERS)
        def consume():
            plgpu.set_max_registers(232, action="increase")
            first_row = warpgroup * rows_each if by_rows else 0
            first_column = 0 if by_rows else warpgroup * columns_each
            columns_smem = pl.ds(first_column, columns_each)

            @plgpu.nd_loop(**loop)
            def _tiles(info, carry):
                row, column = tile_of(info)
                row_gmem, column_gmem = row * tile_m + first_row, column * tile_n + first_column
                scales_gmem = [of_expert(gmem, row) for gmem in w_scale_gmems]
                rows_of = [pl.ds(row_gmem + p * WGMMA_ROWS, WGMMA_ROWS) for p in range(parts)]

                def scales_of(i: Any) -> tuple[jax.Array, ...]:
                    of_weights = [gmem[column_gmem // BLOCK, i] for gmem in scales_gmem]
                    of_rows = (plgpu.load(a_scale_gmem.at[rows, i], layout=ROWS, optimized=False) for rows in rows_of)
                    return tuple(scale_product(scale, weight) for scale in of_rows for weight in of_weights)

                def step(i, state):
                    scales, sums = state
                    slot = lax.rem(carry + i, stages)
                    plgpu.barrier_wait(filled.at[slot])
                    following = scales_of(jnp.minimum(i + 1, steps - 1))

                    def multiply(*accumulators):
                        for at, accumulator in enumerate(accumulators):
                            p, j = divmod(at, count)
                            rows_smem = pl.ds(first_row + p * WGMMA_ROWS, WGMMA_ROWS)
                            plgpu.wgmma(accumulator, a_smem.at[slot, rows_smem], w_smem.at[slot, j, columns_smem].T)
                        added = []
                        for at, accumulator in enumerate(accumulators):
                            product = wgmma_accumulator_load(accumulator, wait_n=len(accumulators) - 1 - at)
                            added.append(sums[at] + product * lax.broadcast_in_dim(scales[at], product.shape, [0]))
                        return tuple(added)

                    fresh = [plgpu.ACC((WGMMA_ROWS, columns_each), jnp.float32)] * (parts * count)
                    sums = pl.run_scoped(multiply, *fresh)
                    plgpu.barrier_arrive(free.at[slot])
                    return following, sums

                zero = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, columns_each), jnp.float32), plgpu.Layout.WGMMA)
                _, sums = lax.fori_loop(0, steps, step, (scales_of(0), (zero,) * (parts * count)))
                for p, rows in enumerate(rows_of):
                    of_rows = None
                    if factors_gmem is not None:
                        of_rows = plgpu.load(factors_gmem.at[rows], layout=ROWS, optimized=False)
                    y = epilogue(*sums[p * count : (p + 1) * count], of_rows).astype(out_dtype)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    y_smem[warpgroup] = y
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(y_smem.at[warpgroup], y_gmem.at[rows, pl.ds(column_gmem, columns_each)])
                return carry + steps

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    expert, real = (None, None) if row_blocks is None else row_blocks
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((m, n), out_dtype),
        grid=(min(sm_count(), row_tiles * column_tiles),),
        grid_names=("sm",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types={
            "a": plgpu.SMEM((stages, tile_m, BLOCK), a.dtype, transforms=swizzled(1)),
            "w": plgpu.SMEM((stages, count, tile_n, BLOCK), a.dtype, transforms=swizzled(1)),
            "y": plgpu.SMEM(
                (CONSUMERS, WGMMA_ROWS, columns_each), out_dtype, transforms=swizzled(jnp.dtype(out_dtype).itemsize)
            ),
            "filled": plgpu.Barrier(num_arrivals=1 + count, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        },
    )(a, a_scale, [w for w, _ in weights], [scale for _, scale in weights], expert, real, factors)


def produce(loop: dict[str, Any], steps: int, stages: int, free: Any, copy: Callable[..., None]) -> None:
    """The producer's part: `copy(info, i, slot)` for every step i of every tile of `loop`, as buffers come free.

    It ends when the buffers of the last steps are read: every phase of a barrier that completes is observed.
    """
    plgpu.set_max_registers(40, action="decrease")

    @plgpu.nd_loop(**loop)
    def total(info, carry):
        @pl.loop(0, steps)
        def _step(i):
            slot = lax.rem(carry + i, stages)
            pl.when(carry + i >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            copy(info, i, slot)

        return carry + steps

    @pl.loop(0, stages)
    def _wait(i):
        step = total - stages + i
        pl.when(step >= 0)(lambda: plgpu.barrier_wait(free.at[lax.rem(step, stages)]))


def swizzled(itemsize: int) -> tuple[Any, ...]:
    """Shared-memory layout of a tile that wgmma or TMA reads: 128-byte swizzle over rows of 128 bytes."""
    return plgpu.TilingTransform((8, 128 // itemsize)), plgpu.SwizzleTransform(128)

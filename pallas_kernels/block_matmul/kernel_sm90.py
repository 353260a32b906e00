"""FP8 matmul for many rows on Hopper: y[m, n] = sum_b sa[m, b] sb[n/128, b] (a[m, b] . w[n, b]).

a [M, K] and w [N, K] are E4M3 or E5M2, b runs over the blocks of 128 along K. Scales that do not vary along K multiply
the finished sums instead: y[m, n] = sa[m] sb[n] sum_b a[m, b] . w[n, b].

Rows may be grouped by expert, in blocks of tile_m that belong to one expert each, and several weights may share their
input, as the gate and up projections do. One persistent thread block an SM takes output tiles in an order that keeps
their operands in the L2 cache. Three warpgroups:

- the producer runs ahead, across tiles, and copies one K block of both operands (TMA, 128-byte swizzle) into each of
  `stages` buffers;
- two consumers share the tile, half its rows or half its columns each. For every K block a consumer issues one wgmma a
  64 rows into a fresh accumulator and adds it, times the two scales of the block, to float32 sums: tensor cores
  accumulate FP8 products in fewer bits than float32 has, so that no chain is longer than 128. With `in_turn` they issue
  alternately, so that one adds while the tensor cores work for the other; left alone they fall into step. A tile goes
  out through two buffers a consumer, so that one is copied while the next is written.

Where there are few tiles, the thread blocks of a cluster share out K instead (split_k.py).

Bound: 2 M N K / 1979 TFLOP/s of FP8 wgmma; an H100 measured 1324 at M = N = K = 4096, 67 %. Before that comes shared
memory: wgmmas of 64 x 128 read 96 of its 128 bytes a cycle, and copies write 48 more for tiles of 128 x 256.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.pallas.mosaic_gpu.primitives import wgmma_accumulator_load
from jax.typing import DTypeLike

from pallas_kernels.block_matmul.pipeline_sm90 import BLOCK, ROWS, WGMMA_ROWS, produce, scaled, swizzled
from pallas_kernels.block_matmul.split_k import AXIS, Shares, clusters
from pallas_kernels.block_matmul.tiling import ManyRows
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.scales import scale_product

CONSUMERS = 2
LEAST_STORED = 16  # columns at a time: a swizzled row of 32 bytes of bfloat16


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

    Or a_scale [M] and w_scale [N], both float32, of all K. M and N are multiples of the tile, K of 128.
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

    weights: pairs of codes [N, K], all of one type, and scales [N/128, K/128], or [N] where a_scale is [M]; with a
    leading expert axis where `row_blocks` (of tile_m rows) is given; blocks that are not real are not written. Several
    weights need a tile that is split by rows.
    factors float32 [M]: for the epilogue, which gets the float32 sums [64, columns] of each weight and the factors
    [64] of its rows (None without).
    """
    (m, k), n, count = a.shape, weights[0][0].shape[-2], len(weights)
    tile_m, tile_n, stages, blocks, cluster = tiling.tile_m, tiling.tile_n, tiling.stages, tiling.blocks, tiling.cluster
    by_rows = tiling.split == "rows"
    rows_each, columns_each = (tile_m // CONSUMERS, tile_n) if by_rows else (tile_m, tile_n // CONSUMERS)
    parts, (row_tiles, column_tiles) = rows_each // WGMMA_ROWS, (m // tile_m, n // tile_n)
    steps = k // BLOCK // tiling.shares  # of a thread block
    chunks = list(itertools.product(range(blocks), range(parts), range(count)))  # the wgmmas of one iteration
    along_rows = tiling.cluster_along == "rows"
    across = (cluster, 1) if along_rows else (1, cluster)  # tiles of a cluster
    whole = (tile_m * across[0], tile_n * across[1], BLOCK * blocks * tiling.shares)
    columns_finished = columns_each // tiling.shares
    pieces = 2 if columns_finished >= 2 * LEAST_STORED else 1  # one is copied out while the next is written
    columns_stored = columns_finished // pieces
    launched = clusters(cluster * tiling.shares, row_tiles * column_tiles // cluster)
    shares = Shares(tiling.shares, parts * count, WGMMA_ROWS, columns_finished, CONSUMERS, launched)
    assert (m % whole[0], n % whole[1], k % whole[2]) == (0, 0, 0), f"{(m, n, k)} in tiles of {tiling}"
    assert by_rows or count == 1, "the consumers of several weights share their columns"
    assert cluster == 1 or tiling.shares == 1, "a cluster shares an operand or K"
    assert across[0] == 1 or row_blocks is None, "neighbouring row blocks may belong to different experts"
    once = a_scale.ndim == 1  # scales multiply finished sums
    ahead = parts * count == 1
    assert len(chunks) % tiling.in_flight == 0, f"{len(chunks)} products in groups of {tiling.in_flight}"

    def kernel(
        a_gmem,
        a_scale_gmem,
        w_gmems,
        w_scale_gmems,
        expert_gmem,
        count_gmem,
        factors_gmem,
        y_gmem,
        *exchanged,
        **scratch,
    ):
        a_smem, w_smem, y_smem, filled, free = (scratch[name] for name in ("a", "w", "y", "filled", "free"))
        warpgroup = lax.axis_index("warpgroup")
        share = 0 if tiling.shares == 1 else lax.axis_index(AXIS)
        first_block = share * steps
        real = None if count_gmem is None else count_gmem[0]
        grid = (row_tiles if real is None else real) // across[0], column_tiles // across[1]
        loop = {"grid": (grid[0] * grid[1],), "collective_axes": "sm", "init_carry": jnp.int32(0)}

        def tile_of(info: plgpu.NDLoopInfo) -> tuple[jax.Array, jax.Array]:
            # Rows of one expert are neighbours: in one tile of the order they read its weights once.
            row, column = plgpu.planar_snake(info.index[0], grid, 0 if tiling.rows_first else 1, tiling.width)
            of_cluster = 0 if cluster == 1 else lax.axis_index("block")
            return (row * cluster + of_cluster, column) if along_rows else (row, column * cluster + of_cluster)

        def of_expert(gmem, row):
            return gmem if expert_gmem is None else gmem.at[expert_gmem[row]]

        @pl.when(warpgroup == CONSUMERS)
        def _produce():
            # Thread blocks of a cluster share an operand: each copies a part of its tile to all of them. (The
            # interpreter has no such copies; there each copies the whole.)
            shared = "block" if cluster > 1 and not is_interpreted() else None
            shared_a, shared_w = (None, shared) if along_rows else (shared, None)

            def copy(info, i, slot):
                row, column = tile_of(info)
                rows, columns = pl.ds(row * tile_m, tile_m), pl.ds(column * tile_n, tile_n)
                block = pl.ds((first_block + i) * BLOCK, BLOCK)
                plgpu.copy_gmem_to_smem(
                    a_gmem.at[rows, block], a_smem.at[slot], filled.at[slot], collective_axes=shared_a
                )
                for j, w_gmem in enumerate(w_gmems):
                    source = of_expert(w_gmem, row).at[columns, block]
                    plgpu.copy_gmem_to_smem(source, w_smem.at[slot, j], filled.at[slot], collective_axes=shared_w)

            produce(loop, steps, stages, free, copy)

        @pl.when(warpgroup < CONSUMERS)
        def consume():
            plgpu.set_max_registers(232, action="increase")
            first_row = warpgroup * rows_each if by_rows else 0
            first_column = 0 if by_rows else warpgroup * columns_each
            columns_smem = pl.ds(first_column, columns_each)
            if tiling.in_turn:
                pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(scratch["turn"].at[0]))

            @plgpu.nd_loop(**loop)
            def _tiles(info, carry):
                row, column = tile_of(info)
                row_gmem, column_gmem = row * tile_m + first_row, column * tile_n + first_column
                scales_gmem = [of_expert(gmem, row) for gmem in w_scale_gmems]
                rows_of = [pl.ds(row_gmem + p * WGMMA_ROWS, WGMMA_ROWS) for p in range(parts)]

                def scales_of(i: Any) -> list[tuple[jax.Array, jax.Array]]:
                    found = []
                    for b, p, j in [] if once else chunks:
                        block = first_block + jnp.minimum(i * blocks + b, steps - 1)
                        of_rows = plgpu.load(a_scale_gmem.at[rows_of[p], block], layout=ROWS, optimized=False)
                        found.append((of_rows, scales_gmem[j][column_gmem // BLOCK, block]))
                    return found

                def step(i, state):
                    scales, sums = state
                    sums = list(sums)
                    # Scales come straight from device memory: an iteration ahead where registers allow it.
                    following = scales_of(i + 1) if ahead else []
                    scales = scales or scales_of(i)

                    def slot_of(b):
                        return lax.rem(carry + i * blocks + b, stages)

                    def multiply(*accumulators, group):
                        for at, accumulator in zip(group, accumulators, strict=True):
                            b, p, j = chunks[at]
                            rows_smem = pl.ds(first_row + p * WGMMA_ROWS, WGMMA_ROWS)
                            operands = a_smem.at[slot_of(b), rows_smem], w_smem.at[slot_of(b), j, columns_smem].T
                            plgpu.wgmma(accumulator, *operands)
                        if tiling.in_turn:
                            plgpu.barrier_arrive(scratch["turn"].at[1 - warpgroup])
                        added = []
                        for left, at, accumulator in zip(reversed(range(len(group))), group, accumulators, strict=True):
                            b, p, j = chunks[at]
                            product = wgmma_accumulator_load(accumulator, wait_n=left)
                            if (p, j) == (parts - 1, count - 1):
                                plgpu.barrier_arrive(free.at[slot_of(b)])
                            if not once:
                                product *= lax.broadcast_in_dim(scale_product(*scales[at]), product.shape, [0])
                            before = next((x for q, x in added[::-1] if q == (p, j)), sums[p * count + j])
                            added.append(((p, j), before + product))
                        return tuple(x for _, x in added)

                    for first in range(0, len(chunks), tiling.in_flight):
                        group = range(first, first + tiling.in_flight)
                        for b in (b for b, p, j in (chunks[at] for at in group) if (p, j) == (0, 0)):
                            # Here, not between an accumulator's birth and its wgmma: that would cost writing zeros.
                            plgpu.barrier_wait(filled.at[slot_of(b)])
                        if tiling.in_turn:
                            plgpu.barrier_wait(scratch["turn"].at[warpgroup])
                        fresh = [plgpu.ACC((WGMMA_ROWS, columns_each), jnp.float32)] * len(group)
                        added = pl.run_scoped(functools.partial(multiply, group=group), *fresh)
                        for at, x in zip(group, added, strict=True):
                            _, p, j = chunks[at]
                            sums[p * count + j] = x
                    return following, tuple(sums)

                zero = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, columns_each), jnp.float32), plgpu.Layout.WGMMA)
                first_scales = scales_of(0) if ahead else []
                _, sums = lax.fori_loop(0, steps // blocks, step, (first_scales, (zero,) * (parts * count)))
                column_gmem += share * columns_finished
                if tiling.shares > 1:
                    for to in range(tiling.shares):
                        columns = slice(to * columns_finished, (to + 1) * columns_finished)
                        shares.send([x[:, columns] for x in sums], to, exchanged, scratch)
                    shares.sent(scratch)
                    sums = shares.receive(exchanged, scratch)
                for p, rows in enumerate(rows_of):
                    of_rows, of_part = None, sums[p * count : (p + 1) * count]
                    if once:
                        columns = pl.ds(column_gmem, columns_finished)
                        of_part = [
                            scaled(x, a_scale_gmem.at[rows], gmem.at[columns])
                            for x, gmem in zip(of_part, scales_gmem, strict=True)
                        ]
                    if factors_gmem is not None:
                        of_rows = plgpu.load(factors_gmem.at[rows], layout=ROWS, optimized=False)
                    y = epilogue(*of_part, of_rows).astype(out_dtype)
                    for piece in range(pieces):
                        plgpu.wait_smem_to_gmem(pieces - 1, wait_read_only=True)
                        y_smem[warpgroup, piece] = y[:, piece * columns_stored : (piece + 1) * columns_stored]
                        plgpu.commit_smem()
                        columns = pl.ds(column_gmem + piece * columns_stored, columns_stored)
                        plgpu.copy_smem_to_gmem(y_smem.at[warpgroup, piece], y_gmem.at[rows, columns])
                if tiling.shares > 1:
                    shares.take(scratch)
                return carry + steps

            if tiling.in_turn:
                pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(scratch["turn"].at[0]))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    expert, real = (None, None) if row_blocks is None else row_blocks
    neighbours: dict[str, Any] = {"cluster": (cluster,), "cluster_names": ("block",)} if cluster > 1 else {}
    free: Any = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)
    if cluster > 1:
        free = plgpu.ClusterBarrier(collective_axes=("block",), num_arrivals=CONSUMERS, num_barriers=stages)
    y, *_ = plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct((m, n), out_dtype), *shares.outputs()),
        grid=(launched,),
        grid_names=("sm",),
        **(neighbours | shares.launch()),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types={
            "a": plgpu.SMEM((stages, tile_m, BLOCK), a.dtype, transforms=swizzled(1)),
            "w": plgpu.SMEM((stages, count, tile_n, BLOCK), weights[0][0].dtype, transforms=swizzled(1)),
            "y": plgpu.SMEM(
                (CONSUMERS, pieces, WGMMA_ROWS, columns_stored),
                out_dtype,
                transforms=swizzled(jnp.dtype(out_dtype).itemsize, columns_stored),
            ),
            "filled": plgpu.Barrier(num_arrivals=1 + count, num_barriers=stages),
            "free": free,
            **({"turn": plgpu.Barrier(num_arrivals=1, num_barriers=CONSUMERS)} if tiling.in_turn else {}),
            **shares.scratch(),
        },
    )(a, a_scale, [w for w, _ in weights], [scale for _, scale in weights], expert, real, factors)
    return y

"""FP8 matmul for many rows on Hopper: y[m, n] = sum_b sa[m, b] sb[n/128, b] (a[m, b] . w[n, b]).

a [M, K] and w [N, K] are E4M3 or E5M2, b runs over the blocks of 128 along K. Scales that do not vary along K multiply
the finished sums instead: y[m, n] = sa[m] sb[n] sum_b a[m, b] . w[n, b].

Rows may be grouped by expert, in blocks of one expert each (a tile, or those of a cluster along rows), and several
weights may share their input, as the gate and up projections do. One persistent thread block an SM takes output tiles
in an order that keeps their operands in the L2 cache. Three warpgroups:

- the producer runs ahead, across tiles, and copies one K block of both operands (TMA, 128-byte swizzle) into each of
  `stages` buffers;
- two consumers share the tile, half its rows or half its columns each. For every K block a consumer issues one wgmma a
  64 rows into a fresh accumulator and adds it, times the two scales of the block, to float32 sums: tensor cores
  accumulate FP8 products in fewer bits than float32 has, so that no chain is longer than 128. What it would wait for
  is asked for before: scales four K blocks ahead (scales_sm90.py), the next buffer while the first product of this one
  is added. With `in_turn` they issue alternately. What becomes of a finished tile is results_sm90.py's.

Where there are few tiles, the thread blocks of a cluster share out K instead (split_k.py).

Bound: 2 M N K / 1979 TFLOP/s of FP8 wgmma; an H100 measured 1324 at M = N = K = 4096, 67 %. Two limits come before: a
consumer's chain for 64 rows of a K block, about 310 cycles of wgmma and 230 of additions, which share the registers'
ports with the other's wgmma, where the tensor cores need 256 for each; and 700 W, at which clocks fall to 1.6 GHz. On
an H200 a K block of 128 x 256 or 256 x 128 takes 1200 to 1290 cycles, where 1024 are needed, and what becomes of a tile
1600 to 1900 more: 2 % of a launch at K = 8192, 15 % at 1024.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.block_matmul.cut import CONSUMERS, Cut
from pallas_kernels.block_matmul.order_sm90 import Order
from pallas_kernels.block_matmul.pipeline_sm90 import BLOCK, ROWS, WGMMA_ROWS, produce, scaled, swizzled
from pallas_kernels.block_matmul.results_sm90 import Codes, Plain, makes_codes
from pallas_kernels.block_matmul.row_blocks import RowBlocks
from pallas_kernels.block_matmul.scales_sm90 import TileScales
from pallas_kernels.block_matmul.split_k import AXIS, Shares, clusters
from pallas_kernels.block_matmul.tiling import ManyRows
from pallas_kernels.formats import QuantFormat
from pallas_kernels.mosaic import fresh_wgmma
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.launch import compiler_params
from pallas_kernels.mosaic.scale_words import BYTES

REGISTERS = 232  # of a thread of a consumer


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
    out_dtype: DTypeLike | QuantFormat,
    row_blocks: RowBlocks | None = None,
    factors: jax.Array | None = None,
    epilogue: Callable[..., jax.Array] = lambda sums, factors: sums,
) -> Any:
    """y [M, N]: `epilogue` of the products of a [M, K] with every weight; of a format, its codes and scales.

    weights: pairs of codes [N, K], all of one type, and scales [N/128, K/128], or [N] where a_scale is [M]; with a
    leading expert axis where `row_blocks` (of tiling.rows rows) is given; blocks that are not real are not written.
    Several weights need a tile that is split by rows. Raises ValueError where blocks have other rows.
    factors float32 [M]: for the epilogue, which gets the float32 sums [64, columns] of each weight and the factors
    [64] of its rows (None without).
    """
    (m, k), n, count = a.shape, weights[0][0].shape[-2], len(weights)
    cut = Cut(m, n, k, count, tiling)
    tile_m, tile_n, stages, blocks, cluster = tiling.tile_m, tiling.tile_n, tiling.stages, tiling.blocks, tiling.cluster
    steps = cut.steps
    launched = clusters(cluster * tiling.shares, cut.row_tiles * cut.column_tiles // cluster)
    shares = Shares(tiling.shares, cut.parts * count, WGMMA_ROWS, cut.finished, CONSUMERS, launched)
    assert not isinstance(out_dtype, QuantFormat) or makes_codes(tiling), f"{tiling} has no whole groups of columns"
    one_each = launched * cluster == cut.row_tiles * cut.column_tiles
    results = Codes(cut, out_dtype) if isinstance(out_dtype, QuantFormat) else Plain(cut, out_dtype, one_each)
    once = a_scale.ndim == 1  # scales multiply finished sums
    in_words = not once and a_scale.dtype == jnp.uint8 and BYTES % blocks == steps % BYTES == 0
    if row_blocks is not None and len(row_blocks.expert) * tiling.rows != m:
        raise ValueError(f"{len(row_blocks.expert)} blocks of {m} rows: {tiling} takes blocks of {tiling.rows}")
    early_wait = blocks == 1 and len(cut.products) > tiling.in_flight

    def kernel(
        a_gmem, a_scale_gmem, w_gmems, w_scale_gmems, expert_gmem, count_gmem, factors_gmem,
        *outs, **scratch,
    ):  # fmt: skip
        a_smem, w_smem, filled, free = (scratch[name] for name in ("a", "w", "filled", "free"))
        outs, exchanged = outs[: len(results.outputs())], outs[len(results.outputs()) :]
        warpgroup = lax.axis_index("warpgroup")
        share = 0 if tiling.shares == 1 else lax.axis_index(AXIS)
        first_block = share * steps
        real = jnp.int32(cut.row_tiles // cut.across[0]) if count_gmem is None else count_gmem[0]
        order = Order(cut, real, expert_gmem, len(weights[0][0]))
        loop = {"grid": (order.count,), "collective_axes": "sm", "init_carry": jnp.int32(0)}

        @pl.when(warpgroup == CONSUMERS)
        def _produce():
            # Thread blocks of a cluster share an operand: each copies a part of its tile to all of them. (The
            # interpreter has no such copies; there each copies the whole.)
            shared = "block" if cluster > 1 and not is_interpreted() else None
            shared_a, shared_w = (None, shared) if cut.across[0] > 1 else (shared, None)

            def copy(of_tile, i, slot):
                row, column, expert = of_tile
                rows, columns = pl.ds(row * tile_m, tile_m), pl.ds(column * tile_n, tile_n)
                block = pl.ds((first_block + i) * BLOCK, BLOCK)
                plgpu.copy_gmem_to_smem(
                    a_gmem.at[rows, block], a_smem.at[slot], filled.at[slot], collective_axes=shared_a
                )
                for j, w_gmem in enumerate(w_gmems):
                    source = order.of_expert(w_gmem, expert).at[columns, block]
                    plgpu.copy_gmem_to_smem(source, w_smem.at[slot, j], filled.at[slot], collective_axes=shared_w)

            def end(slot):
                for _ in range(1 + count):
                    plgpu.barrier_arrive(filled.at[slot])

            def look_up(info):
                return order.look_up(info.index[0])

            produce(loop, steps, stages, free, copy, look_up, end if early_wait else None)

        @pl.when(warpgroup < CONSUMERS)
        def consume():
            plgpu.set_max_registers(REGISTERS, action="increase")
            first_row = warpgroup * cut.rows if cut.by_rows else 0
            first_column = 0 if cut.by_rows else warpgroup * cut.columns
            columns_smem = pl.ds(first_column, cut.columns)
            if tiling.in_turn:
                pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(scratch["turn"].at[0]))

            def scales_of(row: jax.Array, column: jax.Array, expert: Any) -> TileScales:
                rows = [pl.ds(row * tile_m + first_row + p * WGMMA_ROWS, WGMMA_ROWS) for p in range(cut.parts)]
                weights_gmem = [order.of_expert(gmem, expert) for gmem in w_scale_gmems]
                block = (column * tile_n + first_column) // BLOCK
                return TileScales(a_scale_gmem, weights_gmem, rows, block, first_block, steps)

            if early_wait:
                plgpu.barrier_wait(filled.at[0])
            tile = order.look_up(lax.axis_index("sm"))
            first_words = scales_of(*tile).words(0) if in_words else ()
            own_loop: dict[str, Any] = loop | {"init_carry": (jnp.int32(0), tile, first_words)}

            @plgpu.nd_loop(**own_loop)
            def _tiles(info, carry):
                done, tile, words = carry
                column, scales = tile[1], scales_of(*tile)
                next_tile = order.look_up(info.index[0] + launched)

                def step(i, found, sums):
                    """An iteration: its products added, times the scales found, to the sums."""
                    sums = list(sums)

                    def slot_of(b):
                        return lax.rem(done + i * blocks + b, stages)

                    def start(b, p, j):
                        rows_smem = pl.ds(first_row + p * WGMMA_ROWS, WGMMA_ROWS)
                        return fresh_wgmma.start(
                            a_smem.at[slot_of(b), rows_smem], w_smem.at[slot_of(b), j, columns_smem]
                        )

                    def add(product, b, p, j):
                        if (p, j) == (cut.parts - 1, count - 1):
                            plgpu.barrier_arrive(free.at[slot_of(b)])
                        if not once:
                            product *= lax.broadcast_in_dim(found.product(b, p, j), product.shape, [0])
                        sums[p * count + j] = sums[p * count + j] + product

                    for first in range(0, len(cut.products), tiling.in_flight):
                        group = cut.products[first : first + tiling.in_flight]
                        for b in (b for b, *place in group if not any(place) and not early_wait):
                            plgpu.barrier_wait(filled.at[slot_of(b)])
                        if tiling.in_turn:
                            plgpu.barrier_wait(scratch["turn"].at[warpgroup])
                        started = [start(*at) for at in group]
                        if tiling.in_turn:
                            plgpu.barrier_arrive(scratch["turn"].at[1 - warpgroup])
                        for n_started, (at, product) in enumerate(zip(group, started, strict=True)):
                            (product,) = fresh_wgmma.wait([product], len(group) - 1 - n_started)
                            add(product, *at)
                        if first == 0 and early_wait:
                            # Among additions, which hide what a look at a barrier takes; and between two products:
                            # the compiler would start the second before the first is added, in other registers.
                            plgpu.barrier_wait(filled.at[lax.rem(done + i + 1, stages)])
                    return tuple(sums)

                def by_word(group, state):
                    words, sums = state
                    each = BYTES // blocks  # iterations
                    following = scales.words(group + 1)
                    least = words.least()

                    def of_blocks(i, sums):
                        return step(group * each + i, words.bits(i * blocks, blocks, least), sums)

                    return following, lax.fori_loop(0, each, of_blocks, sums)

                def by_block(i, state):
                    found, sums = state
                    following = () if once else scales.blocks((i + 1) * blocks, blocks)
                    return following, step(i, () if once else found.bits(), sums)

                zero = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, cut.columns), jnp.float32), plgpu.Layout.WGMMA)
                sums = (zero,) * (cut.parts * count)
                with jax.named_scope("multiply"):
                    if in_words:
                        state = words, sums
                        _, sums = lax.fori_loop(0, steps // BYTES, by_word, state)
                    else:
                        state = () if once else scales.blocks(0, blocks), sums
                        _, sums = lax.fori_loop(0, steps // blocks, by_block, state)
                if in_words:  # before the results are on their way out
                    words = scales_of(*next_tile).words(0)
                first_finished = column * tile_n + first_column + share * cut.finished
                if tiling.shares > 1:
                    for to in range(tiling.shares):
                        columns = slice(to * cut.finished, (to + 1) * cut.finished)
                        shares.send([x[:, columns] for x in sums], to, exchanged, scratch)
                    shares.sent(scratch)
                    sums = shares.receive(exchanged, scratch)

                with jax.named_scope("finish"):
                    for part, rows in enumerate(scales.rows):
                        of_rows, of_part = None, sums[part * count : (part + 1) * count]
                        if once:
                            columns = pl.ds(first_finished, cut.finished)
                            of_part = [
                                scaled(x, a_scale_gmem.at[rows], gmem.at[columns])
                                for x, gmem in zip(of_part, scales.weights_gmem, strict=True)
                            ]
                        if factors_gmem is not None:
                            of_rows = plgpu.load(factors_gmem.at[rows], layout=ROWS, optimized=False)
                        y = epilogue(*of_part, of_rows)
                        results.write(y, rows, first_finished, warpgroup, outs, scratch)
                if tiling.shares > 1:
                    shares.take(scratch)
                return done + steps, next_tile, words

            if tiling.in_turn:
                pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(scratch["turn"].at[0]))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    expert, real = (None, None) if row_blocks is None else row_blocks
    neighbours: dict[str, Any] = {"cluster": (cluster,), "cluster_names": ("block",)} if cluster > 1 else {}
    free: Any = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)
    if cluster > 1:
        free = plgpu.ClusterBarrier(collective_axes=("block",), num_arrivals=CONSUMERS, num_barriers=stages)
    out = plgpu.kernel(
        kernel,
        out_type=(*results.outputs(), *shares.outputs()),
        grid=(launched,),
        grid_names=("sm",),
        **(neighbours | shares.launch()),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        scratch_types={
            "a": plgpu.SMEM((stages, tile_m, BLOCK), a.dtype, transforms=swizzled(1)),
            "w": plgpu.SMEM((stages, count, tile_n, BLOCK), weights[0][0].dtype, transforms=swizzled(1)),
            **results.scratch(),
            "filled": plgpu.Barrier(num_arrivals=1 + count, num_barriers=stages),
            "free": free,
            **({"turn": plgpu.Barrier(num_arrivals=1, num_barriers=CONSUMERS)} if tiling.in_turn else {}),
            **shares.scratch(),
        },
    )(a, a_scale, [w for w, _ in weights], [scale for _, scale in weights], expert, real, factors)
    return out[0] if isinstance(results, Plain) else out[:2]

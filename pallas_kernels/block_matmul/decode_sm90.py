"""FP8 matmul for few rows on Hopper: every weight is read once, at the speed of memory.

The same product as kernel_sm90.py with few rows, transposed: 64 weight rows are wgmma's M, the tokens its N, so that no
tensor core works on padding and an accumulator is a few registers. Rows may be grouped by expert, in blocks of `rows`
that belong to one expert each; and several weights may share their input, as the gate and up projections do.
Persistent thread blocks take `warpgroups` x 64 rows of every weight:

- the producer copies `blocks` K blocks of the weights and of x a stage, running ahead across tiles: what hides the
  latency of memory is the bytes in flight, stages x weights x warpgroups x 64 x blocks x 128;
- each consumer has 64 of the rows. It issues the wgmmas of all K blocks of a stage into accumulators of their own,
  then adds them, times the scales of weight block and token, to float32 sums in K order. Scales that do not vary along
  K multiply the finished sums instead. The epilogue makes one result of the sums of all weights.

Where there are few tiles, the thread blocks of a cluster share out K (split_k.py). A token's sum is the same whatever
other tokens are present: the tiling decides the order of its terms, and there are no atomics.
Bound: (N K + M K + 2 M N) bytes / 3.35 TB/s and about 2 us of launch and latency. For 256 experts of 3 rows and
[4096, 4096] an H100 measured 2.95 TB/s, 88 %, an H200 4.29, 89 %.
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
from jax._src.pallas.mosaic_gpu.primitives import wgmma_accumulator_load
from jax.typing import DTypeLike

from pallas_kernels.block_matmul.pipeline_sm90 import BLOCK, COLUMNS, WGMMA_ROWS, produce, scaled, swizzled
from pallas_kernels.block_matmul.row_blocks import RowBlocks
from pallas_kernels.block_matmul.split_k import AXIS, Shares, clusters
from pallas_kernels.block_matmul.tiling import FewRows
from pallas_kernels.mosaic.scales import activation_bits, scale_bits, scale_product

TOKENS = COLUMNS  # the layout of a vector with one element a token


def matmul(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    tiling: FewRows,
    out_dtype: DTypeLike = jnp.bfloat16,
) -> jax.Array:
    """y [M, N] of x [M, K], x_scale [K/128, M] (tokens last), w [N, K], w_scale [N/128, K/128].

    Or x_scale [M] and w_scale [N], both float32, of all K. M is a multiple of 8 (wgmma's N), N of 64 x warpgroups, K of
    128 x blocks. Codes E4M3 or E5M2, scales uint8 (UE8M0) or float32.
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

    weights: pairs of codes [N, K], all of one type, and scales [N/128, K/128], or [N] where x_scale is [M]; with a
    leading expert axis where `row_blocks` is given, which may share their one block of x; blocks that are not real are
    not written. factors float32 [M], or [M / rows] of whole blocks: for the epilogue, which gets the float32 sums
    [64, rows] of each weight (tokens last) and the factors [rows] of its tokens (None without).
    """
    k, n, m = x.shape[1], weights[0][0].shape[-2], rows * len(row_blocks.expert) if row_blocks else len(x)
    stages, warpgroups, blocks = tiling.stages, tiling.warpgroups, tiling.blocks
    rows_each, depth, count = WGMMA_ROWS * warpgroups, blocks * BLOCK, len(weights)
    tiles, steps = n // rows_each, k // depth // tiling.shares  # of a thread block
    launched = clusters(tiling.shares, tiles * (m // rows))
    shares = Shares(tiling.shares, count, WGMMA_ROWS, rows, warpgroups, launched)
    once = x_scale.ndim == 1  # scales multiply finished sums
    shared, of_blocks = len(x) < m, factors is not None and len(factors) < m
    assert len(x) in (m, rows), f"{len(x)} rows for {m // rows} blocks of {rows}"
    assert (m % rows, rows % 8, n % rows_each, k % (depth * tiling.shares)) == (0, 0, 0, 0), (
        f"{(m, rows, n, k)} in tiles of {tiling}"
    )

    def kernel(
        x_gmem,
        x_scale_gmem,
        w_gmems,
        w_scale_gmems,
        expert_gmem,
        count_gmem,
        factors_gmem,
        y_gmem,
        *exchanged,
        **scratch,
    ):
        x_smem, w_smem, y_smem, filled, free = (scratch[name] for name in ("x", "w", "y", "filled", "free"))
        warpgroup = lax.axis_index("warpgroup")
        first_step = 0 if tiling.shares == 1 else lax.axis_index(AXIS) * steps
        row_block_count = m // rows if count_gmem is None else count_gmem[0]
        # Row blocks are the inner index: those that share a weight tile run together, and read it from the L2 cache.
        loop = {"grid": (tiles, row_block_count), "collective_axes": "sm", "init_carry": jnp.int32(0)}

        def of_block(block):
            """Weights and their scales of a block's expert."""
            if expert_gmem is None:
                return w_gmems, w_scale_gmems
            expert = expert_gmem[block]
            return tuple([gmem.at[expert] for gmem in gmems] for gmems in (w_gmems, w_scale_gmems))

        def tokens_of(block):
            return pl.ds(0 if shared else block * rows, rows)

        @pl.when(warpgroup == warpgroups)
        def _produce():
            def of_tile(info):
                tile, block = info.index
                return tile, block, of_block(block)[0]

            def copy(found, i, slot):
                tile, block, weights_gmem = found
                rows_gmem, columns = pl.ds(tile * rows_each, rows_each), pl.ds((first_step + i) * depth, depth)
                for j, w_gmem in enumerate(weights_gmem):
                    source = w_gmem.at[rows_gmem, columns]
                    plgpu.copy_gmem_to_smem(source, w_smem.at[slot, j], filled.at[slot])
                plgpu.copy_gmem_to_smem(x_gmem.at[tokens_of(block), columns], x_smem.at[slot], filled.at[slot])

            produce(loop, steps, stages, free, copy, of_tile)

        @pl.when(warpgroup < warpgroups)
        def consume():
            plgpu.set_max_registers(tiling.registers, action="increase")
            rows_smem = pl.ds(warpgroup * WGMMA_ROWS, WGMMA_ROWS)

            @plgpu.nd_loop(**loop)
            def _tiles(info, carry):
                tile, block = info.index
                row = tile * rows_each + warpgroup * WGMMA_ROWS
                tokens = pl.ds(block * rows, rows)
                _, scales_gmem = of_block(block)

                def scales_of(i: Any) -> tuple[tuple[jax.Array, ...], ...]:
                    found = []
                    for b in range(0 if once else blocks):
                        block_of_k = (first_step + i) * blocks + b
                        of_tokens = x_scale_gmem.at[block_of_k, tokens_of(block)]
                        of_tokens = activation_bits(plgpu.load(of_tokens, layout=TOKENS, optimized=False))
                        of_weights = (scale_bits(gmem[row // BLOCK, block_of_k]) for gmem in scales_gmem)
                        found.append(tuple(scale_product(of_tokens, scale) for scale in of_weights))
                    return tuple(found)

                def operands(_, slot, j, columns):
                    return w_smem.at[slot, j, rows_smem, columns], x_smem.at[slot, :, columns]

                zero = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, rows), jnp.float32), plgpu.Layout.WGMMA)
                sums = over_stages((zero,) * count, operands, scales_of, blocks, steps, carry, filled, free)

                def finish(sums):
                    if once:
                        of_weights = (gmem.at[pl.ds(row, WGMMA_ROWS)] for gmem in scales_gmem)
                        of_rows = x_scale_gmem.at[tokens_of(block)]
                        sums = [scaled(x, at, of_rows) for x, at in zip(sums, of_weights, strict=True)]
                    of_tokens = None
                    if of_blocks:
                        of_tokens = plgpu.layout_cast(lax.broadcast_in_dim(factors_gmem[block], (rows,), ()), TOKENS)
                    elif factors_gmem is not None:
                        of_tokens = plgpu.load(factors_gmem.at[tokens], layout=TOKENS, optimized=False)
                    y = epilogue(*sums, of_tokens).astype(out_dtype)
                    if y.dtype == jnp.float32:  # which is not transposed on its way to shared memory
                        y = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    y_smem.at[warpgroup].T[...] = y
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(y_smem.at[warpgroup], y_gmem.at[tokens, pl.ds(row, WGMMA_ROWS)])

                shares.add_up(sums, exchanged, scratch, finish)
                return carry + steps

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    expert, real = (None, None) if row_blocks is None else row_blocks
    y, *_ = plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct((m, n), out_dtype), *shares.outputs()),
        grid=(launched,),
        grid_names=("sm",),
        **shares.launch(),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types={
            "x": plgpu.SMEM((stages, rows, depth), x.dtype, transforms=swizzled(1)),
            "w": plgpu.SMEM((stages, count, rows_each, depth), weights[0][0].dtype, transforms=swizzled(1)),
            "y": plgpu.SMEM((warpgroups, rows, WGMMA_ROWS), out_dtype),
            "filled": plgpu.Barrier(num_arrivals=1 + count, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
            **shares.scratch(),
        },
    )(x, x_scale, [w for w, _ in weights], [scale for _, scale in weights], expert, real, factors)
    return y


def over_stages(
    sums: tuple[jax.Array, ...],
    operands: Callable[..., tuple[Any, Any]],
    scales_of: Callable[[Any], Any],
    blocks: int,
    steps: int,
    before: Any,
    filled: Any,
    free: Any,
) -> tuple[jax.Array, ...]:
    """`with_stage` of `steps` stages, `before` of which there have been others; scales are asked for a stage ahead.

    operands: of a step and its buffer, and of what `with_stage` says. scales_of: the scales of a step.
    """
    stages = filled.shape[0]

    def step(i, state):
        scales, sums = state
        slot = lax.rem(before + i, stages)
        plgpu.barrier_wait(filled.at[slot])
        following = scales_of(jnp.minimum(i + 1, steps - 1))
        sums = with_stage(sums, functools.partial(operands, i, slot), scales, blocks)
        plgpu.barrier_arrive(free.at[slot])
        return following, sums

    return lax.fori_loop(0, steps, step, (scales_of(0), sums))[1]


def with_stage(
    sums: Sequence[jax.Array], operands: Callable[..., tuple[Any, Any]], scales: Any, blocks: int
) -> tuple[jax.Array, ...]:
    """float32 sums [64, rows] of each weight, and the products of a stage of `blocks` K blocks, added in their order.

    operands: of a weight's number and columns of the stage, [64, columns] of the weight and [rows, columns] of x, in
    shared memory. scales: by K block and weight, [rows] by token; none where they multiply finished sums.
    """
    count = len(sums)

    def multiply(*accumulators):
        for at, accumulator in enumerate(accumulators):
            b, j = divmod(at, count)
            of_weight, of_x = operands(j, pl.ds(b * BLOCK, BLOCK))
            plgpu.wgmma(accumulator, of_weight, of_x.T)
        added = list(sums)
        for at, accumulator in enumerate(accumulators):
            b, j = divmod(at, count)
            product = wgmma_accumulator_load(accumulator, wait_n=len(accumulators) - 1 - at)
            if scales:
                product *= lax.broadcast_in_dim(scales[b][j], product.shape, [1])
            added[j] = added[j] + product
        return tuple(added)

    return pl.run_scoped(multiply, *[plgpu.ACC(sums[0].shape, jnp.float32)] * (blocks * count))

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

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_matmul.decode_sm90 import with_stage
from pallas_kernels.block_matmul.pipeline_sm90 import BLOCK, COLUMNS, WGMMA_ROWS, produce, swizzled
from pallas_kernels.block_matmul.split_k import AXIS, Shares, clusters
from pallas_kernels.block_matmul.tiling import FewRows
from pallas_kernels.formats import QuantFormat
from pallas_kernels.grouped_matmul.one_token_tiling import ROWS
from pallas_kernels.grouped_matmul.own_row_sm90 import OwnRow
from pallas_kernels.mosaic.launch import store_narrow
from pallas_kernels.mosaic.scales import scale_bits, scale_product


def product(
    rows: jax.Array,
    experts: jax.Array,
    weights: Sequence[tuple[jax.Array, jax.Array]],
    tiling: FewRows,
    form: QuantFormat,
    *,
    added: bool,
    factors: jax.Array | None = None,
    epilogue: Callable[..., jax.Array] = lambda sums, factors: sums,
) -> jax.Array:
    """bfloat16 [k, N], a row for each of experts int32 [k], of one row [1, K] bfloat16; or [1, N], `added`, of [k, K].

    weights: pairs of codes [E, N, K] and scales [E, N/128, K/128], uint8 (UE8M0) or float32. factors float32 [k]: for
    the epilogue, which gets the float32 sums [64, 8] of each weight, whose first column is the token's, and factors [8]
    (None without). form: that rows are rounded to.
    """
    (_, n, k), stages, warpgroups, blocks = weights[0][0].shape, tiling.stages, tiling.warpgroups, tiling.blocks
    terms = len(experts) if added else 1
    results, rows_each, depth, count = len(experts) // terms, WGMMA_ROWS * warpgroups, blocks * BLOCK, len(weights)
    tiles, of_term, steps = n // rows_each, k // depth, terms * k // depth // tiling.shares
    launched = clusters(tiling.shares, tiles * results)
    shares = Shares(tiling.shares, count, WGMMA_ROWS, ROWS, warpgroups, launched)
    own = OwnRow(steps, blocks, warpgroups, form)
    assert rows.shape == (terms, k), f"rows {rows.shape} for {terms} experts [{n}, {k}]"
    assert (n % rows_each, k % depth, terms * of_term % tiling.shares) == (0, 0, 0), f"{(n, k, terms)} by {tiling}"

    def kernel(row_gmem, expert_gmem, w_gmems, w_scale_gmems, factors_gmem, y_gmem, *exchanged, **scratch):
        w_smem, filled, free = (scratch[name] for name in ("w", "filled", "free"))
        warpgroup = lax.axis_index("warpgroup")
        first_step = 0 if tiling.shares == 1 else lax.axis_index(AXIS) * steps
        loop = {"grid": (results, tiles), "collective_axes": "sm", "init_carry": jnp.int32(0)}

        def place(result: Any, i: Any) -> tuple[Any, Any]:
            """Of a step: which expert it is of, and which of its K steps."""
            at = first_step + i
            return expert_gmem[result * terms + lax.div(at, of_term)], lax.rem(at, of_term)

        @pl.when(warpgroup == warpgroups)
        def _produce():
            def copy(info, i, slot):
                result, tile = info.index
                expert, step = place(result, i)
                rows_gmem, columns = pl.ds(tile * rows_each, rows_each), pl.ds(step * depth, depth)
                for j, w_gmem in enumerate(w_gmems):
                    source = w_gmem.at[expert, rows_gmem, columns]
                    plgpu.copy_gmem_to_smem(source, w_smem.at[slot, j], filled.at[slot])

            produce(loop, steps, stages, free, copy)

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

                def step(i, state):
                    scales, sums = state
                    slot = lax.rem(carry + i, stages)
                    plgpu.barrier_wait(filled.at[slot])
                    following = scales_of(jnp.minimum(i + 1, steps - 1))

                    def operands(j, columns):
                        return w_smem.at[slot, j, rows_smem, columns], scratch["row"].at[i, :, columns]

                    sums = with_stage(sums, operands, scales, blocks)
                    plgpu.barrier_arrive(free.at[slot])
                    return following, sums

                zero = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, ROWS), jnp.float32), plgpu.Layout.WGMMA)
                _, sums = lax.fori_loop(0, steps, step, (scales_of(0), (zero,) * count))

                def finish(sums):
                    write(sums, factors_gmem, epilogue, result, row, y_gmem)

                shares.add_up(sums, exchanged, scratch, finish)
                return carry + steps

    y, *_ = plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct((results, n), jnp.bfloat16), *shares.outputs()),
        grid=(launched,),
        grid_names=("sm",),
        **shares.launch(),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types={
            "w": plgpu.SMEM((stages, count, rows_each, depth), weights[0][0].dtype, transforms=swizzled(1)),
            "filled": plgpu.Barrier(num_arrivals=count, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
            **own.scratch(),
            **shares.scratch(),
        },
    )(rows.reshape(-1, BLOCK), experts, [w for w, _ in weights], [scale for _, scale in weights], factors)
    return y


def write(
    sums: Sequence[jax.Array], factors_gmem: Any, epilogue: Callable[..., jax.Array], result: Any, row: Any, y_gmem: Any
) -> None:
    """64 channels of y_gmem, from `row` on, become the first column of what the epilogue makes of sums [64, 8] each."""
    factor = None
    if factors_gmem is not None:
        factor = plgpu.layout_cast(lax.broadcast_in_dim(factors_gmem[result], (ROWS,), ()), COLUMNS)
    y = epilogue(*sums, factor)
    column = plgpu.broadcasted_iota(jnp.int32, y.shape, 1, layout=plgpu.Layout.WGMMA)
    own = jnp.sum(jnp.where(column == 0, y, 0.0), axis=1)
    store_narrow(y_gmem, (result, pl.ds(row, WGMMA_ROWS)), own.astype(jnp.bfloat16))

"""Attention of one query over several lists of entries, of what it is over each: the last step of a split, on Hopper.

    lse = log sum_s exp(lse[s]),   out = turn(sum_s exp(lse[s] - lse) out[s] / (1 + exp(sink - lse)))

A thread block is one warpgroup, which takes heads, and of wide ones 256 channels. All parts of a head are asked for
before the first is needed, and added in their order. Bound: 4 S bytes a channel, which were written last and are in the
L2 cache, and about 2 us of launch and latency.
"""

# Pallas decorators turn functions into values: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.mosaic.launch import compiler_params, sm_count, store_narrow
from pallas_kernels.sparse_attention import fours_sm90 as fours
from pallas_kernels.sparse_attention.turn_sm90 import turned

PER_SM = 8  # thread blocks
THREADS = 128  # of a thread block


def combine(
    out: jax.Array, lse: jax.Array, sink: jax.Array | None, factors: jax.Array | None, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """out [N, H, K] of type dtype and lse [N, H] of out float32 [S, N, H, K], lse [S, N, H] without the sink [H].

    The parts' channels lie as `fours_sm90.stored` has them if K is a multiple of its CHANNELS.
    Where no part has an entry, 0 and -inf. factors: see `turn_sm90.factors`, None where nothing is turned.
    """
    splits, queries, heads, width = out.shape
    in_fours = width % fours.CHANNELS == 0
    channels = fours.CHANNELS if in_fours else width

    def kernel(parts_gmem, lses_gmem, sink_gmem, factors_gmem, out_gmem, lse_gmem):
        layout = fours.ADDED if in_fours else plgpu.Layout.WG_STRIDED((channels,), vec_size=channels // THREADS)
        of_channels = fours.IN_ORDER if in_fours else layout

        def all_over(x: jax.Array) -> jax.Array:
            return jnp.full((channels,), x)

        def load(ref: Any, layout: Any) -> jax.Array:
            return plgpu.load(ref, layout=layout, optimized=False)

        @plgpu.nd_loop((queries, heads, width // channels), collective_axes="sm")
        def _heads(info):
            query, head, piece = info.index
            here = pl.ds(piece * channels, channels)
            lses = [lses_gmem[s, query, head] for s in range(splits)]
            parts = [load(parts_gmem.at[s, query, head, here], layout) for s in range(splits)]
            top = functools.reduce(jnp.maximum, lses)
            top = jnp.where(top == -jnp.inf, 0.0, top)
            weights = [jnp.exp(all_over(x - top)) for x in lses]
            total = functools.reduce(jnp.add, weights)
            some = total != 0
            total = jnp.where(some, total, 1.0)
            together = jnp.where(some, jnp.log(total) + top, -jnp.inf)
            share = jnp.where(some, 1 / total, 0.0)
            if sink_gmem is not None:
                share = share / (1 + jnp.exp(all_over(sink_gmem[head]) - together))
            share = jnp.where(some, share, 0.0)
            added = functools.reduce(jnp.add, [w * x for w, x in zip(weights, parts, strict=True)])
            added = added * share
            if in_fours:
                added = fours.in_order(added)
            if factors_gmem is not None:
                cos, sin = (load(factors_gmem.at[query, i, here], of_channels) for i in range(2))
                added = turned(added, cos, sin, of_channels)
            store_narrow(out_gmem, (query, head, here), added.astype(dtype))

            @pl.when(piece == 0)
            def _lse():
                lse_gmem[query, pl.ds(head, 1)] = together[:1]

    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((queries, heads, width), dtype),
            jax.ShapeDtypeStruct((queries, heads), jnp.float32),
        ),
        grid=(min(queries * heads * (width // channels), PER_SM * sm_count()),),
        grid_names=("sm",),
        compiler_params=compiler_params(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(out, lse, sink, factors)

"""The end of a query: sums of weights to the softmax's denominators, the sink, the log-sum-exp, and out."""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.sparse_attention import columns_sm90 as columns
from pallas_kernels.sparse_attention import convert_sm90 as convert
from pallas_kernels.sparse_attention import gather_sm90 as gather
from pallas_kernels.sparse_attention.add_sm90 import ADDERS, LOG2_E, Unit, of_heads, scaled
from pallas_kernels.sparse_attention.score_sm90 import SCORERS, USUAL, Scratch


def finish(
    unit: Unit, sums: Sequence[jax.Array], scratch: Scratch, me: jax.Array, sink_gmem: Any, out_gmem: Any, lse_gmem: Any, tiles: int
) -> None:
    """This adder's half of the channels of the output, and the log-sum-exp without the sink.

    bfloat16 goes out through q's shared memory, as float16's bits; float32, the results of splits, at once.
    """
    q_smem = scratch["q"]
    half = q_smem.shape[-1]
    plgpu.barrier_wait(scratch["summed"])  # and nobody reads q any more
    total, top = totals(scratch)
    some = total != 0
    lse2 = jnp.where(some, jnp.log2(jnp.where(some, total, 1.0)) + (top - USUAL), 0.0)
    share = jnp.where(some, 2.0**-convert.HEADROOM / jnp.where(some, total, 1.0), 0.0)
    if sink_gmem is not None:
        share = share / (1 + jnp.exp2(of_heads(sink_gmem.at[unit.heads]) * LOG2_E - lse2))
    sums = scaled(sums, share)

    @pl.when(me == 0)
    def _lse():
        lse_gmem[unit.split, unit.query, unit.heads] = jnp.where(some, lse2 / LOG2_E, -jnp.inf)

    out_gmem = out_gmem.at[unit.split, unit.query, unit.heads, pl.ds(me * half, half)]
    float32 = out_gmem.dtype == jnp.float32
    each = sums[0].shape[1]
    # Adders have different tiles.
    for adder in range(ADDERS):

        @pl.when(me == adder)
        def _pieces(adder=adder):
            for i, x in enumerate(sums):
                begin = (adder * half + i * each) // gather.TILE
                kinds = [begin + j < tiles for j in range(each // gather.TILE)]
                if float32:
                    parts = convert.natural(x, kinds)
                else:
                    parts = convert.natural(lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.float16), kinds)
                for j, part in enumerate(parts):
                    column = pl.ds(i * each + j * gather.TILE, gather.TILE)
                    if float32:
                        out_gmem[:, column] = part
                    else:
                        q_smem[me, :, column] = part

    if not float32:
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[me], out_gmem)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def totals(scratch: Scratch) -> tuple[jax.Array, jax.Array]:
    """The sums of weights of both scorers, and what they are relative to, of each head."""
    parts = [
        of_heads(scratch["sums"].at[scorer, warp]) for scorer in range(SCORERS) for warp in range(columns.WARPS)
    ]
    return sum(parts[1:], start=parts[0]), of_heads(scratch["top"])

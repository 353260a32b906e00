"""The end of a query: sums of weights to the softmax's denominators, the sink, the log-sum-exp, and out."""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.sparse_attention.held_sm90 import TILE
from pallas_kernels.sparse_attention.many import columns_sm90 as columns
from pallas_kernels.sparse_attention.many import convert_sm90 as convert
from pallas_kernels.sparse_attention.many.add_sm90 import ADDERS, of_heads, scaled
from pallas_kernels.sparse_attention.many.score_sm90 import SCORERS, USUAL, Scratch
from pallas_kernels.sparse_attention.turn_sm90 import turned
from pallas_kernels.sparse_attention.units_sm90 import HEADS, Unit
from pallas_kernels.sparse_attention.words_sm90 import LOG2_E


class Whole(NamedTuple):
    """What enters at the end: the sinks of heads, and what channels from `turned_from` on turn by."""

    sink_gmem: Any
    factors_gmem: Any
    turned_from: int


def finish(
    unit: Unit,
    blocks: jax.Array,
    sums: Sequence[jax.Array],
    scratch: Scratch,
    me: jax.Array,
    whole: Whole,
    out_gmem: Any,
    lse_gmem: Any,
    tiles: int,
) -> None:
    """This adder's half of the channels of the output, and the log-sum-exp without the sink.

    bfloat16 goes out through q's shared memory, as float16's bits. The first `tiles` tiles of channels are those of
    codes. sums: of `blocks` blocks of entries.
    """
    with jax.named_scope("wait for sums"):
        plgpu.barrier_wait(scratch["summed"])  # and nobody reads q any more
    share, lse = denominators(blocks, scratch, unit, whole.sink_gmem)
    q_smem, sums = scratch["q"], scaled(sums, share)
    half = q_smem.shape[-1]
    out_gmem = out_gmem.at[unit.part, unit.query, unit.heads, pl.ds(me * half, half)]
    with jax.named_scope("put"):
        for adder in range(ADDERS):  # their channels are in different orders
            pl.when(me == adder)(lambda adder=adder: put(unit, sums, q_smem, adder, whole, tiles))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_smem.at[me], out_gmem)

    @pl.when(me == 0)  # now: the fence before a copy waits for all that is stored before it
    def _lse():
        lse_gmem[unit.part, unit.query, unit.heads] = lse

    with jax.named_scope("wait for the copy"):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def put(unit: Unit, sums: Sequence[jax.Array], q_smem: Any, adder: int, whole: Whole, tiles: int) -> None:
    """The output of an adder to q_smem; channels in their own order."""
    each, half = sums[0].shape[1], q_smem.shape[-1]
    for i, x in enumerate(sums):
        begins = range(i * each, (i + 1) * each, TILE)
        first = adder * half // TILE
        of_codes = [first + begin // TILE < tiles for begin in begins]
        for begin, is_codes, tile in zip(begins, of_codes, convert.natural(x, of_codes), strict=True):
            here = pl.ds(begin, TILE)
            if whole.factors_gmem is not None and adder * half + begin + TILE > whole.turned_from:
                layout = convert.layout_of(is_codes)
                factors_gmem = whole.factors_gmem.at[unit.query, :, pl.ds(adder * half + begin, TILE)]
                tile = turned(tile, *(of_channels(factors_gmem.at[j], layout) for j in range(2)), layout)
            q_smem[adder, :, here] = lax.bitcast_convert_type(tile.astype(jnp.bfloat16), jnp.float16)


def of_channels(ref: Any, layout: Any) -> jax.Array:
    """What is the same for all heads."""
    x = plgpu.load(ref, layout=layout.reduce(0), optimized=False)
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (HEADS, TILE), [1]), layout)


def denominators(blocks: jax.Array, scratch: Scratch, unit: Unit, sink_gmem: Any) -> tuple[jax.Array, jax.Array]:
    """What sums are to be multiplied by, and the log-sum-exp without the sink, of each head."""
    total, top = totals(blocks, scratch)
    some = total != 0
    lse2 = jnp.where(some, jnp.log2(jnp.where(some, total, 1.0)) + (top - USUAL), 0.0)
    share = jnp.where(some, 2.0**-convert.HEADROOM / jnp.where(some, total, 1.0), 0.0)
    if sink_gmem is not None:
        share = share / (1 + jnp.exp2(of_heads(sink_gmem.at[unit.heads]) * LOG2_E - lse2))
        share = jnp.where(some, share, 0.0)  # also if the sink is NaN
    return share, jnp.where(some, lse2 / LOG2_E, -jnp.inf)


def totals(blocks: jax.Array, scratch: Scratch) -> tuple[jax.Array, jax.Array]:
    """The sums of weights of both scorers, and what they are relative to, of each head."""
    last = lax.rem(blocks + SCORERS - 1, SCORERS)  # who had the last block, and may have raised the reference in it

    def of_scorer(scorer: jax.Array) -> jax.Array:
        parts = [of_heads(scratch["sums"].at[scorer, warp]) for warp in range(columns.WARPS)]
        return functools.reduce(jnp.add, parts)

    stale = (blocks > 0) & (scratch["raised"][last] != 0)
    fade = jnp.where(stale, of_heads(scratch["fade"].at[last]), 1.0)
    return of_scorer(last) + of_scorer(1 - last) * fade, of_heads(scratch["top"])

"""From the numbers of a token to a sub-layer's input: the sum of streams by their weights and RMSNorm, on Hopper.

Two warpgroups have one token at a time, half of its columns each: its streams are copied to shared memory (TMA) before
its numbers are known, and x stays in registers from the weighted sum to its norm. As soon as both have summed, streams
of a token to come are asked for. The sum of squares crosses warps and warpgroups in shared memory.

Bound: memory, (2 n + 2) D bytes a token, of which streams come from the L2 cache.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.formats import QuantFormat
from pallas_kernels.hyper_connection import codes_sm90
from pallas_kernels.hyper_connection.codes_sm90 import neighbours
from pallas_kernels.hyper_connection.coefficients_sm90 import BATCH, SLOTS, Numbers, sigmoid
from pallas_kernels.hyper_connection.handover_sm90 import Handover, Nothing, Unsaid
from pallas_kernels.hyper_connection.partials_sm90 import SQUARES
from pallas_kernels.hyper_connection.share_sm90 import Share
from pallas_kernels.hyper_connection.tiling import CHUNK, FINISHERS, STREAMS, PreTiling
from pallas_kernels.mosaic import warp_sums
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.launch import store_narrow

MOST_EARLY = 7168  # columns of streams that registers hold beside x and the norm's weight


def scratch(width: int, tiling: PreTiling) -> dict[str, Any]:
    """held: tokens' streams in rows of 128. squares: of x, by rounds in turn, finishers and their warps."""
    return {
        "held": plgpu.SMEM((tiling.held, STREAMS * width // CHUNK, CHUNK), jnp.bfloat16),
        "arrived": plgpu.Barrier(num_arrivals=1, num_barriers=tiling.held),
        "squares": plgpu.SMEM((2, FINISHERS, warp_sums.WARPS), jnp.float32),
        "both": plgpu.Barrier(num_arrivals=FINISHERS),
    }


def finish(
    finisher: jax.Array,
    streams_gmem: Any,
    base_gmem: Any,
    scale_gmem: Any,
    norm_weight_gmem: Any,
    outs_gmem: Sequence[Any],
    *,
    form: QuantFormat | None,
    share: Share,
    numbers: Numbers,
    handover: Handover | Unsaid | Nothing,
    few: bool,
    mixed: Any,
    ready: Any,
    read: Any,
    held: Any,
    arrived: Any,
    squares: Any,
    both: Any,
) -> None:
    """x of the thread block's tokens, by one of two warpgroups.

    streams_gmem: [m, 4 D / 128, 128]. outs_gmem: for x, and if there is a `form` for its codes and their scales.
    few: whether tokens are few. Then its numbers are what a token waits for, and its streams are in registers before.
    """
    tokens, width = streams_gmem.shape[0], streams_gmem.shape[1] * CHUNK // STREAMS
    columns = pl.ds(finisher * (width // FINISHERS), width // FINISHERS)
    layout = neighbours(width // FINISHERS)
    early = few and width <= MOST_EARLY
    base, scale = [base_gmem[o] for o in range(STREAMS)], scale_gmem[0]

    def ask_for_streams(i: Any) -> None:
        @pl.when((finisher == 0) & (i < share.rounds))
        def _ask():
            token, slot = jnp.minimum(share.token(i), tokens - 1), lax.rem(i, held.shape[0])
            plgpu.copy_gmem_to_smem(streams_gmem.at[token], held.at[slot], arrived.at[slot])

    def stream(i: jax.Array, s: int) -> jax.Array:
        token = held.at[lax.rem(i, held.shape[0])]
        if is_interpreted():  # it has no views of other shapes
            chunks = width // FINISHERS // CHUNK
            return token[pl.ds((FINISHERS * s + finisher) * chunks, chunks)].reshape(-1)
        of_streams = token.reshape(STREAMS, width)
        return plgpu.load(of_streams.at[s, columns], layout=layout, optimized=False)

    def wait_for_streams(i: jax.Array) -> None:
        with jax.named_scope("wait for streams"):
            plgpu.barrier_wait(arrived.at[lax.rem(i, held.shape[0])])

    for i in range(held.shape[0]):
        ask_for_streams(jnp.int32(i))
    factors = plgpu.load(norm_weight_gmem.at[columns], layout=layout, optimized=False).astype(jnp.float32)

    def weights_of(i: jax.Array) -> list[jax.Array]:
        slot = lax.rem(i, SLOTS)
        plgpu.barrier_wait(ready.at[lax.rem(i, ready.shape[0])])
        inverse_rms = lax.rsqrt(mixed[slot, SQUARES] / (STREAMS * width) + numbers.norm_eps)
        return [sigmoid(mixed[slot, s] * inverse_rms * scale + base[s]) + numbers.eps for s in range(STREAMS)]

    @pl.loop(0, share.rounds)
    def _round(i):
        loaded = []
        if early:
            wait_for_streams(i)
            loaded = [stream(i, s) for s in range(STREAMS)]
        with jax.named_scope("wait for numbers"):
            weights = weights_of(i)
        batch = lax.div(i, BATCH)
        wanted_again = (lax.rem(i, BATCH) == BATCH - 1) & ((batch + 2) * BATCH < share.rounds)
        pl.when(wanted_again)(lambda: plgpu.barrier_arrive(read.at[lax.rem(batch, 2)]))
        if not early:
            wait_for_streams(i)
        with jax.named_scope("sum streams"):
            of_streams = loaded if early else (stream(i, s) for s in range(STREAMS))  # one after the other
            weighted = [weight * of_one.astype(jnp.float32) for weight, of_one in zip(weights, of_streams, strict=True)]
            wide = functools.reduce(jnp.add, weighted)
        handover.have_read(i)
        turn = lax.rem(i, 2)
        with jax.named_scope("sum squares"):
            warp_sums.store(squares.at[turn, finisher], wide * wide, layout)
            plgpu.commit_smem()  # the streams have been read
            plgpu.barrier_arrive(both)
            plgpu.barrier_wait(both)
        with jax.named_scope("ask for streams"):
            ask_for_streams(i + held.shape[0])  # both have read what was there
        of_warps = [squares[turn, f, w] for f in range(FINISHERS) for w in range(warp_sums.WARPS)]
        total = functools.reduce(jnp.add, of_warps)
        x = wide * lax.rsqrt(total / width + numbers.norm_eps) * factors

        @pl.when(share.token(i) < tokens)
        def _store():
            x_gmem, *codes_gmem = outs_gmem
            rounded = x.astype(jnp.bfloat16)
            with jax.named_scope("store"):
                store_narrow(x_gmem, (share.token(i), columns), rounded)
            if form is not None:
                codes_sm90.store(codes_gmem[0], codes_gmem[1], share.token(i), finisher, rounded, form)

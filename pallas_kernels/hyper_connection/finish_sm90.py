"""From partial products to a sub-layer's input: the sum of streams by their weights and RMSNorm, on Hopper.

A warpgroup has one token at a time: its streams, 8 neighbours a thread, are in registers before the token's partial
products are known, and x stays there from the weighted sum to its norm. As soon as x is summed the next token's streams
are asked for. The partials are summed a lane for each of the 24 numbers, parts over the four warps; the sums also go to
the warpgroup that makes the other coefficients.

Bound: memory, (2 n + 2) D bytes a token, of which streams come from the L2 cache.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hyper_connection.coefficients_sm90 import SLOTS, Numbers, sigmoid
from pallas_kernels.hyper_connection.project_sm90 import ROW, SQUARES
from pallas_kernels.hyper_connection.share_sm90 import Share
from pallas_kernels.hyper_connection.tiling import CHUNK, STREAMS, TWO_FINISH
from pallas_kernels.quantize_rows.kernel_sm90 import registers, spread


def finish(
    finisher: jax.Array,
    partial_gmem: Any,
    streams_gmem: Any,
    base_gmem: Any,
    scale_gmem: Any,
    norm_weight_gmem: Any,
    x_gmem: Any,
    *,
    share: Share,
    numbers: Numbers,
    wait_for: Callable[[jax.Array], None],
    have_read: Callable[[jax.Array], None],
    mixed: Any,
    whose: Any,
    noted: Any,
    taken: Any,
) -> None:
    """x of the finisher's tokens, by one warpgroup; the 24 numbers and the squares of each into a row of `mixed`.

    wait_for: until the partials of round i are in memory. have_read: tells that the round's streams are in registers.
    """
    tokens, _, groups, _ = streams_gmem.shape
    layout = registers(groups)
    ahead = groups * CHUNK <= TWO_FINISH  # there are registers for the next token's streams beside x
    base, scale = [base_gmem[o] for o in range(STREAMS)], scale_gmem[0]
    each = SLOTS // share.cut.finishers

    def load_streams(i: jax.Array) -> list[jax.Array]:
        token = jnp.minimum(share.token(i, finisher), tokens - 1)
        at = streams_gmem.at[token]
        return [plgpu.load(at.at[s], layout=layout, optimized=False) for s in range(STREAMS)]

    def round_(i, streams):
        token = share.token(i, finisher)
        streams = streams or load_streams(i)
        of_batch = lax.rem(i, each)
        pl.when((of_batch == 0) & (i > 0))(lambda: plgpu.barrier_wait(taken))
        wait_for(i)
        slot = of_batch * share.cut.finishers + finisher
        sums = mixed.at[slot]
        sums[pl.ds(0, ROW)] = summed(partial_gmem.at[:, :, jnp.minimum(token, partial_gmem.shape[2] - 1)])
        whose[slot] = jnp.where(token < tokens, token, -1)
        inverse_rms = lax.rsqrt(sums[SQUARES] / (STREAMS * groups * CHUNK) + numbers.norm_eps)
        weights = [sigmoid(sums[s] * inverse_rms * scale + base[s]) + numbers.eps for s in range(STREAMS)]
        pl.when((of_batch == each - 1) | (i == share.rounds - 1))(lambda: plgpu.barrier_arrive(noted))
        parts = [weight * stream.astype(jnp.float32) for weight, stream in zip(weights, streams, strict=True)]
        wide = functools.reduce(jnp.add, parts)
        have_read(i)
        streams = load_streams(i + 1) if ahead else []
        squares = jnp.sum(wide * wide, axis=1)
        squares = jnp.sum(squares) if groups > 1 else spread(squares, layout)
        factors = plgpu.load(norm_weight_gmem, layout=layout, optimized=False).astype(jnp.float32)
        x = wide * lax.rsqrt(squares / (groups * CHUNK) + numbers.norm_eps) * factors

        @pl.when(token < tokens)
        def _store():
            x_gmem[token] = x.astype(jnp.bfloat16)

        return streams

    lax.fori_loop(0, share.rounds, round_, load_streams(jnp.int32(0)) if ahead else [])


def summed(partial_gmem: Any) -> jax.Array:
    """[32] in each warp's lanes, of a token's partials [groups, each, 32]."""
    groups, each, _ = partial_gmem.shape
    lanes = part_lanes(groups)
    loaded = [plgpu.load(partial_gmem.at[:, c], layout=lanes, optimized=False) for c in range(each)]
    return jnp.sum(functools.reduce(jnp.add, loaded), axis=0)


def part_lanes(groups: int) -> Any:
    """How a warpgroup has [groups, 32]: a lane for each column, groups over as many warps as divide them."""
    warps = math.gcd(groups, 4)
    warp_dims = {4: (-3,), 2: (plgpu.Replicated(2), -3), 1: (plgpu.Replicated(4),)}[warps]
    return plgpu.Layout.TILED(plgpu.Tiling(((warps, ROW), (1,))), warp_dims, (-2,), -1)

"""The coefficients of mHC on Hopper: sums of partials, then `post` and `comb` of many tokens, a lane a token.

One warpgroup sums a token's partial products, a lane for each of the 24 numbers and parts over the four warps, and
hands them to the finishers. Every BATCH tokens it makes of them what finishers do not need: sigmoids and Sinkhorn.

Sinkhorn divides the rows and the columns of a matrix A in turn by their sums: it is diag(1/p) A diag(1/q) all the time.
So only p and q change, four numbers each:

    p_i <- sum_j A_ij / q_j + eps p_i,    q_j <- sum_i A_ij / p_i + eps q_j,

where eps is the one beside the sums (the old p is what divided the row before). Two fractions have one reciprocal,
a / p_0 + b / p_1 = (a p_1 + b p_0) / (p_0 p_1), whose numerator is made while it is under way. 16 + 8 numbers of a
token are in registers of its lane, so that nothing moves between threads. Bound: latency, some 50 cycles a half.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hyper_connection.handover_sm90 import Handover, Nothing, Unsaid
from pallas_kernels.hyper_connection.partials_sm90 import ROW, SQUARES, Partials, Words
from pallas_kernels.hyper_connection.share_sm90 import Cut, Share
from pallas_kernels.hyper_connection.tiling import FINISHERS, MIXED, STREAMS, TILE
from pallas_kernels.mosaic import lane_rows

SLOTS = lane_rows.ROWS  # tokens whose numbers are kept
BATCH = SLOTS // 2  # of which the coefficients are made at once, while those of the other half are still read
WANTED = SQUARES + lane_rows.PITCH  # columns of a row, a multiple of four


# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false


class Numbers(NamedTuple):
    """What `pre` is told besides its arrays."""

    iterations: int
    eps: float
    norm_eps: float


def scratch(of: Cut) -> dict[str, Any]:
    """mixed: the sums of the partials of the token of round i in row i % SLOTS."""
    rows = min(SLOTS, of.most_rounds)
    return {
        "mixed": plgpu.SMEM((SLOTS, ROW + lane_rows.PITCH), jnp.float32),
        "ready": plgpu.Barrier(num_arrivals=1, num_barriers=rows),  # a row is written
        "read": plgpu.Barrier(num_arrivals=FINISHERS, num_barriers=2),  # the finishers have read a batch's
    }


def make_coefficients(
    partials: Partials | Words,
    base_gmem: Any,
    scale_gmem: Any,
    post_gmem: Any,
    comb_gmem: Any,
    *,
    share: Share,
    columns: int,
    numbers: Numbers,
    handover: Handover | Unsaid | Nothing,
    mixed: Any,
    ready: Any,
    read: Any,
) -> None:
    """Sums of partials, `post` and `comb` of the thread block's tokens, by one warpgroup."""
    base = [base_gmem[o] for o in range(MIXED)]
    scale = [scale_gmem[i] for i in range(3)]

    at_once = 2 if TILE % (2 * share.cut.parts) == 0 else 1  # rounds, whose tokens are of one tile

    def sum_partials(first: jax.Array) -> None:
        rounds = [first + i for i in range(at_once)]
        with jax.named_scope("wait for partials"):
            handover.wait_for(first)
        with jax.named_scope("sum"):
            loaded = [partials.load(i) for i in rounds]
            for i, of_token in zip(rounds, loaded, strict=True):
                mixed.at[lax.rem(i, SLOTS)][pl.ds(0, ROW)] = summed(of_token)
                plgpu.barrier_arrive(ready.at[lax.rem(i, ready.shape[0])])

    @pl.loop(0, lax.div(share.rounds + BATCH - 1, BATCH))
    def _batch(b):
        half, first = lax.rem(b, 2), b * BATCH
        rounds = jnp.minimum(BATCH, share.rounds - first)
        with jax.named_scope("wait for finishers"):
            pl.when(b >= 2)(lambda: plgpu.barrier_wait(read.at[half]))
        pl.loop(0, lax.div(rounds, at_once))(lambda i: sum_partials(first + i * at_once))
        of_batch = plgpu.broadcasted_iota(jnp.int32, (SLOTS,), 0, layout=lane_rows.LAYOUT) - half * BATCH
        tokens = share.token(first + of_batch)
        exists = (of_batch >= 0) & (of_batch < rounds) & (tokens < share.cut.tokens)
        tokens = jnp.where(exists, tokens, -1)
        found = lane_rows.load(mixed, WANTED)
        inverse_rms = lax.rsqrt(found[SQUARES] / columns + numbers.norm_eps)
        logits = [found[o] * inverse_rms * scale[min(o // STREAMS, 2)] + base[o] for o in range(MIXED)]
        lane_rows.store(post_gmem, tokens, [2 * sigmoid(x) for x in logits[STREAMS : 2 * STREAMS]])
        with jax.named_scope("sinkhorn"):
            lane_rows.store(comb_gmem, tokens, sinkhorn(logits[2 * STREAMS :], numbers))


def summed(sums: list[jax.Array]) -> jax.Array:
    """[32] in each warp's lanes, of a token's partials.

    Mosaic adds what warps hold in memory that it has once for a thread block: no other warpgroup may do so.
    """
    while len(sums) > 1:
        sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
    return jnp.sum(sums[0], axis=0)


def sinkhorn(logits: list[jax.Array], numbers: Numbers) -> list[jax.Array]:
    """The 16 numbers of the matrix, row by row, from those of its logits: `reference.sinkhorn` unrolled."""
    n = STREAMS
    matrix = [softmax(logits[i : i + n], numbers.eps) for i in range(0, n * n, n)]
    columns = [list(column) for column in zip(*matrix, strict=True)]

    def sums(lines: list[list[jax.Array]], divisors: list[jax.Array], last: list[jax.Array]) -> list[jax.Array]:
        a, b, c, d = divisors
        of_first, of_second = lane_rows.reciprocal(a * b), lane_rows.reciprocal(c * d)
        return [
            (numbers.eps * old + of_first * (line[0] * b + line[1] * a)) + of_second * (line[2] * d + line[3] * c)
            for line, old in zip(lines, last, strict=True)
        ]

    def both(_: Any, state: tuple[list[jax.Array], list[jax.Array]]) -> tuple[list[jax.Array], list[jax.Array]]:
        of_rows, of_columns = state
        of_rows = sums(matrix, of_columns, of_rows)
        return of_rows, sums(columns, of_rows, of_columns)

    of_columns = [functools.reduce(jnp.add, column) + numbers.eps for column in columns]
    ones = [jnp.ones_like(total) for total in of_columns]
    of_rows, of_columns = lax.fori_loop(0, numbers.iterations - 1, both, (ones, of_columns))
    by_row, by_column = ([lane_rows.reciprocal(total) for total in totals] for totals in (of_rows, of_columns))
    return [matrix[i][j] * by_row[i] * by_column[j] for i in range(n) for j in range(n)]


def softmax(row: list[jax.Array], eps: float) -> list[jax.Array]:
    most = functools.reduce(jnp.maximum, row)
    powers = [jnp.exp(x - most) for x in row]
    scale = lane_rows.reciprocal(functools.reduce(jnp.add, powers))
    return [power * scale + eps for power in powers]


def sigmoid(x: jax.Array) -> jax.Array:
    return 1 / (1 + jnp.exp(-x))

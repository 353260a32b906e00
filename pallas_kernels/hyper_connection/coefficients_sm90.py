"""`post` and `comb` of mHC on Hopper, a lane a token: sigmoids, and Sinkhorn's iterations on two vectors.

Sinkhorn divides the rows and the columns of a matrix A in turn by their sums: it is diag(r) A diag(c) all the time. So
only r and c change, four numbers each, and an iteration is two products with A and eight reciprocals:

    1 / r_i <- sum_j A_ij c_j + eps / r_i,    1 / c_j <- sum_i A_ij r_i + eps / c_j,

where eps is the one beside the sums (the old 1 / r_i is what scaled the row before). 16 + 16 numbers of a token are in
registers of its lane, so that nothing moves between threads. Bound: latency, a chain of some 40 cycles a half.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hyper_connection.project_sm90 import ROW, SQUARES
from pallas_kernels.hyper_connection.share_sm90 import Share
from pallas_kernels.hyper_connection.tiling import MIXED, STREAMS
from pallas_kernels.mosaic import lane_rows

WANTED = SQUARES + lane_rows.PITCH  # columns of a row, a multiple of four
SLOTS = lane_rows.ROWS  # tokens whose coefficients are made at once


# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false


class Numbers(NamedTuple):
    """What `pre` is told besides its arrays."""

    iterations: int
    eps: float
    norm_eps: float


def scratch(finishers: int) -> dict[str, Any]:
    """mixed: the sums of a token's partials in a row. whose: which token, -1 for none."""
    return {
        "mixed": plgpu.SMEM((SLOTS, ROW + lane_rows.PITCH), jnp.float32),
        "whose": plgpu.SMEM((SLOTS,), jnp.int32),
        "noted": plgpu.Barrier(num_arrivals=finishers),
        "taken": plgpu.Barrier(num_arrivals=1),
    }


def make_coefficients(
    base_gmem: Any,
    scale_gmem: Any,
    post_gmem: Any,
    comb_gmem: Any,
    *,
    share: Share,
    columns: int,
    numbers: Numbers,
    announce: Callable[[jax.Array], None],
    mixed: Any,
    whose: Any,
    noted: Any,
    taken: Any,
) -> None:
    """`post` and `comb` of the thread block's tokens, by one warpgroup, which also tells finishers when they can go on.

    announce: waits until the partials of round i are in memory, and says so.
    """
    finishers = share.cut.finishers
    each = SLOTS // finishers
    base = [base_gmem[o] for o in range(MIXED)]
    scale = [scale_gmem[i] for i in range(3)]

    @pl.loop(0, lax.div(share.rounds + each - 1, each))
    def _batch(b):
        rounds = jnp.minimum(each, share.rounds - b * each)
        pl.loop(0, rounds)(lambda i: announce(b * each + i))
        plgpu.barrier_wait(noted)
        found = lane_rows.load(mixed, WANTED)
        slot = plgpu.broadcasted_iota(jnp.int32, (SLOTS,), 0, layout=lane_rows.LAYOUT)
        rows = jnp.where(slot < rounds * finishers, plgpu.load(whose, layout=lane_rows.LAYOUT, optimized=False), -1)
        pl.when((b + 1) * each < share.rounds)(lambda: plgpu.barrier_arrive(taken))
        inverse_rms = lax.rsqrt(found[SQUARES] / columns + numbers.norm_eps)
        logits = [found[o] * inverse_rms * scale[min(o // STREAMS, 2)] + base[o] for o in range(MIXED)]
        lane_rows.store(post_gmem, rows, [2 * sigmoid(x) for x in logits[STREAMS : 2 * STREAMS]])
        lane_rows.store(comb_gmem, rows, sinkhorn(logits[2 * STREAMS :], numbers))


def sinkhorn(logits: list[jax.Array], numbers: Numbers) -> list[jax.Array]:
    """The 16 numbers of the matrix, row by row, from those of its logits: `reference.sinkhorn` unrolled."""
    n = STREAMS
    rows = [logits[i : i + n] for i in range(0, n * n, n)]
    matrix = [softmax(row, numbers.eps) for row in rows]
    columns = [list(column) for column in zip(*matrix, strict=True)]

    def totals(lines: list[list[jax.Array]], factors: list[jax.Array], last: list[jax.Array]) -> list[jax.Array]:
        return [dot(line, factors, numbers.eps * old) for line, old in zip(lines, last, strict=True)]

    of_columns = [functools.reduce(jnp.add, column) + numbers.eps for column in columns]
    ones = [jnp.ones_like(total) for total in of_columns]

    def both(_: Any, state: tuple[list[jax.Array], list[jax.Array]]) -> tuple[list[jax.Array], list[jax.Array]]:
        of_rows, of_columns = state
        of_rows = totals(matrix, reciprocals(of_columns), of_rows)
        return of_rows, totals(columns, reciprocals(of_rows), of_columns)

    of_rows, of_columns = lax.fori_loop(0, numbers.iterations - 1, both, (ones, of_columns))
    row_factors, column_factors = reciprocals(of_rows), reciprocals(of_columns)
    return [matrix[i][j] * row_factors[i] * column_factors[j] for i in range(n) for j in range(n)]


def softmax(row: list[jax.Array], eps: float) -> list[jax.Array]:
    most = functools.reduce(jnp.maximum, row)
    powers = [jnp.exp(x - most) for x in row]
    scale = lane_rows.reciprocal(functools.reduce(jnp.add, powers))
    return [power * scale + eps for power in powers]


def dot(a: list[jax.Array], b: list[jax.Array], plus: jax.Array) -> jax.Array:
    """The products of four numbers, and `plus`, in a chain of three: `plus` is there before b."""
    first, second, third, fourth = (x * y for x, y in zip(a, b, strict=True))
    return ((plus + first) + second) + (third + fourth)


def reciprocals(x: list[jax.Array]) -> list[jax.Array]:
    return [lane_rows.reciprocal(total) for total in x]


def sigmoid(x: jax.Array) -> jax.Array:
    return 1 / (1 + jnp.exp(-x))

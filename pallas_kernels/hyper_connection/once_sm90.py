"""mHC's `pre` of many tokens, whose streams are read once: clusters of 16."""

# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hyper_connection import once_sums_sm90 as sums
from pallas_kernels.hyper_connection import once_worker_sm90 as pieces
from pallas_kernels.hyper_connection.coefficients_sm90 import Numbers, sigmoid, sinkhorn
from pallas_kernels.hyper_connection.once_worker_sm90 import PARTS, QUARTER, ROWS, STREAMS, SWIZZLED, TOKENS
from pallas_kernels.mosaic import cluster, fresh_wgmma
from pallas_kernels.mosaic.launch import compiler_params, sm_count

WORKERS = 4
PITCH = 20
BATCH = 128


def run(streams, fn, base, scale, norm_weight, numbers: Numbers, *, stages=6, units=1, lag=2, early=2, registers=(104, 32, 24, 32)):
    SLOTS, LAG = 2 * lag, lag
    """streams [m, 4, D]; m is a multiple of 8."""
    tokens, _, width = streams.shape
    if units != 1 or stages <= lag or width != PARTS * WORKERS * QUARTER or tokens % 8:
        raise ValueError(
            f"units={units}, stages={stages}, lag={lag}, streams {streams.shape}: it takes one unit, more stages than "
            f"tiles of lag, a width of {PARTS * WORKERS * QUARTER} and a multiple of 8 tokens"
        )
    columns = STREAMS * width
    each = TOKENS * units
    tiles = -(-tokens // each)
    teams = min(sm_count() // PARTS - 1, tiles)
    most = -(-tiles // teams)
    PARTIALS, WEIGHTS, SQUARES, FILLED = 0, SLOTS, 2 * SLOTS, 2 * SLOTS + 2  # barriers
    message, weights_message, squares_message = sums.message_bytes(each), 16 * each, PARTS * each * 4

    def kernel(streams_gmem, fn_gmem, base_gmem, scale_gmem, norm_weight_gmem, x_gmem, post_gmem, comb_gmem, **r):
        team, part, warpgroup = lax.axis_index("team"), lax.axis_index("part"), lax.axis_index("warpgroup")
        mine = lax.div(tiles - team + teams - 1, teams)
        barriers = r["barriers"]
        expected = [message] * SLOTS + [weights_message] * SLOTS + [squares_message] * 2 + [None] * stages
        cluster.start(barriers, expected)

        def turn(i, slots=SLOTS):
            return lax.rem(i, slots), lax.rem(lax.div(i, slots), 2)

        def token(i):
            return (team + i * teams) * each

        @pl.when(warpgroup < WORKERS)
        def _work():
            plgpu.set_max_registers(registers[0], action="increase")
            quarter = warpgroup

            def tile_of(i):
                return r["ring"].at[lax.rem(i, stages), quarter]

            rows = pieces.load_rows(fn_gmem, part, quarter)
            with jax.named_scope("terms"):
                fns = pieces.terms_of(rows, r["ring"].at[stages - 1, quarter])
                plgpu.commit_smem()
                plgpu.barrier_arrive(r["split"])
            cluster.joined()

            def wait_for_streams(i):
                with jax.named_scope("wait for streams"):
                    cluster.wait(barriers, FILLED + lax.rem(i, stages), lax.rem(lax.div(i, stages), 2))

            def wait_for_weights(i):
                slot, parity = turn(i)
                with jax.named_scope("wait for weights"):
                    cluster.wait(barriers, WEIGHTS + slot, parity)
                    pl.when(quarter == 0)(lambda: cluster.expect(barriers, WEIGHTS + slot, weights_message))
                return r["weights"].at[slot]

            def hand_over(i, products):
                with jax.named_scope("wait for products"):
                    (products,) = fresh_wgmma.wait([products], 0)
                with jax.named_scope("hand over"):
                    pl.when(i > 0)(lambda: plgpu.barrier_wait(r["taken"]))
                    pieces.store_products(products, r["partial"].at[quarter])
                    plgpu.barrier_arrive(r["multiplied"])

            def project(i):
                wait_for_streams(i)
                hand_over(i, pieces.start_products(fns, tile_of(i)))

            def weigh(i):
                weights = wait_for_weights(i)
                x = pieces.weigh(tile_of(i), weights, r["small"].at[quarter])
                plgpu.barrier_arrive(r["squared"])
                return [x]

            def advance(i):
                """Products of tile i, and x of the one `LAG` before."""
                wait_for_streams(i)
                weights = wait_for_weights(i - LAG)
                with jax.named_scope("multiply and weigh"):
                    products, x = pieces.advance(fns, tile_of(i), tile_of(i - LAG), weights, r["small"].at[quarter])
                    plgpu.barrier_arrive(r["squared"])
                hand_over(i, products)
                return [x]

            def finish(i, x):
                with jax.named_scope("wait for squares"):
                    factors = pieces.load_factors(norm_weight_gmem, part, quarter)
                    plgpu.barrier_wait(r["scaled"])
                with jax.named_scope("store"):
                    for u, of_unit in enumerate(x):
                        first = u * TOKENS
                        pieces.store_x(
                            x_gmem, of_unit, factors, r["small"].at[WORKERS], first, token(i) + first, part, quarter
                        )

            for i in range(LAG):
                pl.when(i < mine)(lambda i=i: project(jnp.int32(i)))

            def step(i, x):
                pl.when(i > LAG)(lambda: finish(i - LAG - 1, x))
                return advance(i)

            def last(i, x):
                pl.when(i > 0)(lambda: finish(i - 1, x))
                return weigh(i)

            x = [plgpu.layout_cast(jnp.zeros((TOKENS * QUARTER,), jnp.float32), pieces.HELD)]
            x = lax.fori_loop(LAG, mine, step, x)
            x = lax.fori_loop(jnp.maximum(mine - LAG, 0), mine, last, x)
            finish(mine - 1, x)

        def load(i):
            tile, at = r["ring"].at[lax.rem(i, stages)], FILLED + lax.rem(i, stages)
            pieces.load_streams(streams_gmem, tile, barriers, at, token(i), part)

        def send_of(i):
            (slot, parity) = turn(i)
            with jax.named_scope("wait for products"):
                plgpu.barrier_wait(r["multiplied"])
            with jax.named_scope("send"):
                sums.send_partials(
                    r["partial"], r["squared_streams"], r["received"], barriers.at[pl.ds(2 * PARTIALS, 2 * SLOTS)],
                    slot, part,
                )  # fmt: skip
                plgpu.barrier_arrive(r["taken"])

        def weights_of(i, base, scale):
            (slot, parity) = turn(i)
            with jax.named_scope("wait for partials"):
                cluster.wait(barriers, PARTIALS + slot, parity)
                cluster.expect(barriers, PARTIALS + slot, message)
            with jax.named_scope("weights"):
                logits, squares = sums.load_partials(r["received"], r["mixed"], slot, i * units)
                inverse_rms = lax.rsqrt(squares / columns + numbers.norm_eps)
                weights = sigmoid(logits * inverse_rms * scale + base) + numbers.eps
                cluster.warpgroup_barrier()  # all have read what came
                sums.send_weights(weights, r["weights"], barriers.at[pl.ds(2 * WEIGHTS, 2 * SLOTS)], slot, part)

        def scale_of(i):
            (slot, parity) = turn(i, 2)
            with jax.named_scope("wait for squared"):
                plgpu.barrier_wait(r["squared"])
                cluster.warpgroup_barrier()  # all have read what the tile before brought
            pl.when(i + stages < mine)(lambda: load(i + stages))
            with jax.named_scope("send squares"):
                here = r["small"].at[pl.ds(0, WORKERS)]
                sums.send_squares(here, r["squares"], barriers.at[pl.ds(2 * SQUARES, 4)], slot, part)
            with jax.named_scope("wait for all squares"):
                cluster.wait(barriers, SQUARES + slot, parity)
                cluster.expect(barriers, SQUARES + slot, squares_message)
            with jax.named_scope("scale"):
                squares = sums.load_squares(r["squares"], slot)
                sums.store_inverse(r["small"].at[WORKERS], lax.rsqrt(squares / width + numbers.norm_eps))
                plgpu.barrier_arrive(r["scaled"])

        @pl.when(warpgroup == WORKERS)
        def _sum():
            plgpu.set_max_registers(registers[1], action="decrease")
            base, scale = sums.load_base(base_gmem, units), scale_gmem[0]
            cluster.joined()

            @pl.loop(0, mine + lag - 1)
            def _tile(i):
                pl.when(i < mine)(lambda: send_of(i))
                pl.when(i >= lag - 1)(lambda: weights_of(i - lag + 1, base, scale))

            plgpu.barrier_arrive(r["mixed_there"])

        @pl.when(warpgroup == WORKERS + 1)
        def _scale():
            plgpu.set_max_registers(registers[2], action="decrease")
            for i in range(min(early, stages - 1)):
                pl.when(i < mine)(lambda i=i: load(jnp.int32(i)))
            plgpu.barrier_wait(r["split"])
            for i in range(min(early, stages - 1), stages):
                pl.when(i < mine)(lambda i=i: load(jnp.int32(i)))
            cluster.joined()
            pl.loop(0, mine)(scale_of)

        @pl.when(warpgroup == WORKERS + 2)
        def _square():
            plgpu.set_max_registers(registers[3], action="decrease")
            cluster.joined()

            @pl.loop(0, mine)
            def _tile(i):
                with jax.named_scope("wait for streams"):
                    cluster.wait(barriers, FILLED + lax.rem(i, stages), lax.rem(lax.div(i, stages), 2))
                with jax.named_scope("square"):
                    squares = pieces.square(r["ring"].at[lax.rem(i, stages)])
                with jax.named_scope("wait for sums"):
                    pl.when(i > 0)(lambda: plgpu.barrier_wait(r["taken"]))
                pieces.store_squares(squares, r["squared_streams"])
                plgpu.barrier_arrive(r["multiplied"])

            plgpu.barrier_wait(r["mixed_there"])
            bases = [base_gmem[STREAMS + o] for o in range(5 * STREAMS)]
            scales = [scale_gmem[n] for n in range(3)]

            @pl.loop(0, lax.div(mine * units + BATCH - 1, BATCH))
            def _batch(b):
                with jax.named_scope("sinkhorn"):
                    found = sums.load_numbers(r["mixed"], PITCH, b * BATCH)
                    inverse_rms = lax.rsqrt(found[sums.OWN] / columns + numbers.norm_eps)
                    post, comb = [], []
                    for w in range(STREAMS):
                        post.append(2 * sigmoid(found[4 * w] * inverse_rms * scales[1] + bases[w]))
                        comb.append(jnp.zeros_like(inverse_rms))
                        for j in range(1, STREAMS):
                            of_row = bases[STREAMS + STREAMS * w : 2 * STREAMS + STREAMS * w]
                            comb.append(found[4 * w + j] * inverse_rms * scales[2] + (of_row[j] - of_row[0]))
                    where = (b * BATCH, mine * units, team, teams, units, part)
                    sums.store_numbers(post_gmem, post, *where)
                    sums.store_numbers(comb_gmem, sinkhorn(comb, numbers), *where)

    mixed_rows = most * units
    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16),
            jax.ShapeDtypeStruct((tokens, STREAMS), jnp.float32),
            jax.ShapeDtypeStruct((tokens, STREAMS * STREAMS), jnp.float32),
        ),
        grid=(teams,),
        grid_names=("team",),
        cluster=(PARTS,),
        cluster_names=("part",),
        num_threads=WORKERS + 3,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        scratch_types={
            "ring": plgpu.SMEM((stages, WORKERS, STREAMS, each, QUARTER), jnp.bfloat16, transforms=SWIZZLED),
            "partial": plgpu.SMEM((WORKERS, ROWS, each), jnp.float32),
            "small": plgpu.SMEM((WORKERS + 1, each), jnp.float32),  # squares, and by what to scale
            "received": plgpu.SMEM((SLOTS, PARTS, sums.SENT, units), jnp.float32),
            "weights": plgpu.SMEM((SLOTS, each, STREAMS), jnp.float32),
            "squared_streams": plgpu.SMEM((STREAMS, each), jnp.float32),
            "squares": plgpu.SMEM((2, PARTS, each), jnp.float32),
            "mixed": plgpu.SMEM((mixed_rows, PITCH), jnp.float32),
            "barriers": plgpu.SMEM(((FILLED + stages) * cluster.BARRIER_WORDS,), jnp.int32),
            "split": plgpu.Barrier(num_arrivals=WORKERS),
            "multiplied": plgpu.Barrier(num_arrivals=WORKERS + 1),
            "taken": plgpu.Barrier(),
            "squared": plgpu.Barrier(num_arrivals=WORKERS),
            "scaled": plgpu.Barrier(),
            "mixed_there": plgpu.Barrier(),
        },
    )(streams, fn, base, scale, norm_weight)


def pre(streams, fn, base, scale, norm_weight, *, iterations, eps, norm_eps, **how):
    return run(streams, fn, base, scale, norm_weight, Numbers(iterations, eps, norm_eps), **how)

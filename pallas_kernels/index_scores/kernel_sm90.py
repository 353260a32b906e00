"""Indexer scores from FP8 or FP4 keys on Hopper: score[t, c] = sum_h w[t, h] relu(q[t, h] . k_c), float32.

Keys are wgmma's M, heads its N; K is one chain of at most 128, in E4M3. FP8: k_c = s_c codes and q[t, h] = s_th codes,
scales that are not negative: they come out of the ReLU. FP4: both have a scale for each group of 32 channels, folded
into E4M3 codes, so that one is left again (fp4_keys.py).
Persistent thread blocks share the items, ITEM keys of one unit (a block of query tokens of one sequence) each, evenly
by what the units' counts say (schedule.py); a unit's queries stay in shared memory. Warpgroups:

- the producer copies a unit's queries, and an item's codes and scales a page at a time, running ahead across items and
  units: stages x 16.5 KB (FP4: 8.5) in flight hide the latency of memory;
- two consumers, or two teams of two that take turns at items, have half the keys of an item each (consumer.py). A
  consumer issues the wgmmas of all tokens of the unit, then reduces one while the later run, and stores float32 scores
  straight to memory. FP8 codes are multiplied where they are, FP4 ones are looked up into wgmma's registers.

A score is of one key and one query: no split, no order that depends on others. What is stored behind a unit's count is
of the last key's page at best, and garbage.
Bound: C (K + 4 + 4 T) bytes (FP4: C (K/2 + K/32 + 4 T)) / 3.35 TB/s and about 2 us of launch and latency. At 64 heads x
128 and one token 64 FP8 keys come in 672 cycles of an SM's share of 3 TB/s; their wgmmas take 128, and some 150
instructions of each of a scheduler's warps. On an H100: 262144 keys 15.7 us (68 % of the bound), 32 x 65536 102.8 (83
%), 128 x 8192 53.8 (80 %). FP4 keys take some 320 instructions, in half the cycles: they bind. On an H200, FP8 and FP4:
12.2 and 12.3, 74.7 and 75.2, 39.5 and 41.7 us; its memory is faster, its multiprocessors are the same.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.index_scores.consumer import (
    IN_FLIGHT,
    KEYS,
    Fp4Queries,
    fp8_factors,
    score_fp4,
    score_fp8,
    unpack_queries,
)
from pallas_kernels.index_scores.fp4_keys import GROUP
from pallas_kernels.index_scores.schedule import likely_first, prefetch, walk
from pallas_kernels.index_scores.tiling import CONSUMERS, ITEM, UNPACKED, ScoreTiling
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.launch import compiler_params, sm_count

QUERIES = 2  # buffers of a unit's queries


class Keys(NamedTuple):
    """Index keys as they lie in memory, in pages of `size` keys; a sequence's are `size` x its number of pages.

    codes [rows, ...], E4M3 [K] or eight E2M1 codes a word, int32 [K/8]: those of page p begin at row p * stride. scale
    [pages, n]: those of page p are the last `size` of line p, float32, or for E2M1 an integer with a byte for each
    group of 32 channels. table int32 [B, n]: the page of keys i * size ... None: `shared` says whether page i is page i
    of every sequence, or sequence b has one page, b.
    size divides ITEM or is a multiple of it.
    """

    codes: jax.Array
    scale: jax.Array
    table: jax.Array | None
    size: int
    stride: int
    entries: int
    shared: bool = False


def index_scores(
    q: jax.Array, q_scale: jax.Array, weights: jax.Array, keys: Keys, counts: jax.Array, tiling: ScoreTiling
) -> jax.Array:
    """float32 [B, T, C], C the entries rounded up to ITEM, of q [B, T, H, ...] and q_scale and weights [B, T, H].

    q and q_scale are as keys are: E4M3 [K] and float32, or E2M1 int32 [K/8] and an integer of a byte a group.
    counts int32 [B, T]: keys that a token wants; scores from the most that a block of tokens wants on are garbage, and
    no page there is looked up. H is a multiple of 8, K 32, 64 or 128; tiling.tokens divides T.
    """
    batch, t, heads, columns_of_q = q.shape
    tokens, stages, teams = tiling.tokens, tiling.stages, tiling.teams
    consumers, fp4 = CONSUMERS * teams, keys.codes.dtype == jnp.int32
    q, q_scale, weights = q.reshape(-1, columns_of_q), q_scale.reshape(-1), weights.reshape(-1)
    unpacked = -(-tokens * heads // UNPACKED)  # blocks of UNPACKED that a unit's rows are unpacked in
    if fp4 and (missing := unpacked * UNPACKED - tokens * heads):  # behind the last unit's
        q, q_scale, weights = (jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))) for x in (q, q_scale, weights))
    of_batch, columns = t // tokens, -(-keys.entries // ITEM) * ITEM
    assert t % tokens == 0, f"{t} tokens in blocks of {tokens}"
    assert stages % teams == 0, f"{stages} buffers for {teams} teams"
    assert ITEM % keys.size == 0 or keys.size % ITEM == 0, f"pages of {keys.size} keys"
    sms = sm_count()
    part = min(keys.size, ITEM)  # keys of one copy
    registers = registers_of(tiling)

    def kernel(q_gmem, q_scale_gmem, weights_gmem, codes_gmem, scale_gmem, table_gmem, counts_gmem, y_gmem, **scratch):
        q_smem, codes_smem, scale_smem = (scratch[name] for name in ("q", "codes", "scale"))
        copied_smem, codes_smem = (codes_smem, codes_smem) if is_interpreted() or fp4 else codes_smem
        filled, free, q_filled, q_free = (scratch[name] for name in ("filled", "free", "q_filled", "q_free"))
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("sm")

        def of_token(j):
            return pl.ds(j * heads, heads)

        def of_this_block(segment):
            return walk(counts_gmem, keys.entries, block, sms, segment)

        @pl.when(warpgroup == consumers)
        def _produce():
            if registers:
                plgpu.set_max_registers(registers[0], action="decrease")

            if table_gmem is not None:
                # Its line is on the way while counts are, which say where this block begins.
                unit, item = likely_first(batch * of_batch, columns // ITEM, block, sms)
                page = lax.div(item * ITEM, keys.size)
                prefetch(table_gmem.at[lax.div(unit, of_batch), pl.ds(page, 1)])

            def segment(unit, first, items, segments, done):
                if not fp4:
                    q_slot = lax.rem(segments, QUERIES)
                    pl.when(segments >= QUERIES)(lambda: plgpu.barrier_wait(q_free.at[q_slot]))
                    for j in range(tokens):
                        source = q_gmem.at[pl.ds((unit * tokens + j) * heads, heads)]
                        plgpu.copy_gmem_to_smem(source, q_smem.at[q_slot, of_token(j)], q_filled.at[q_slot])
                sequence = lax.div(unit, of_batch)
                # Of the last item some pages may lie behind the count, where the table is not to be believed.
                wanted = counts_gmem[unit, 0]
                for j in range(1, tokens):
                    wanted = jnp.maximum(wanted, counts_gmem[unit, j])
                last = lax.div(jnp.minimum(wanted, keys.entries) - 1, keys.size)

                @pl.loop(0, items)
                def _items(i):
                    slot = lax.rem(done + i, stages)
                    begin = (first + i) * ITEM
                    places = []
                    for j in range(ITEM // part):
                        entry = begin + j * part
                        page = jnp.minimum(lax.div(entry, keys.size), last)
                        place = lax.rem(entry, keys.size) if keys.size > ITEM else 0
                        if table_gmem is not None:
                            page = table_gmem[sequence, page]
                        elif not keys.shared:
                            page = sequence
                        places.append((page, place))
                    pl.when(done + i >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    for j, (page, place) in enumerate(places):
                        held = pl.ds(j * part, part)
                        rows = pl.ds(page * keys.stride + place, part)
                        plgpu.copy_gmem_to_smem(codes_gmem.at[rows], copied_smem.at[slot, held], filled.at[slot])
                        rows = pl.ds(place + (keys.scale.shape[1] - keys.size), part)
                        plgpu.copy_gmem_to_smem(scale_gmem.at[page, rows], scale_smem.at[slot, held], filled.at[slot])

            segments, done = of_this_block(segment)
            for total, buffers, barrier in ((done, stages, free), *([] if fp4 else [(segments, QUERIES, q_free)])):

                @pl.loop(0, buffers)
                def _wait(i, total=total, buffers=buffers, barrier=barrier):
                    step = total - buffers + i
                    pl.when(step >= 0)(lambda: plgpu.barrier_wait(barrier.at[lax.rem(step, buffers)]))

        @pl.when(warpgroup < consumers)
        def _consume():
            if registers:
                plgpu.set_max_registers(registers[1], action="increase")
            team = lax.div(warpgroup, CONSUMERS)
            place = lax.rem(warpgroup, CONSUMERS) * KEYS
            held = pl.ds(place, KEYS)
            staged = None if scratch["staged"] is None else scratch["staged"].at[warpgroup]

            def segment(unit, first, items, segments, done):
                q_slot = lax.rem(segments, QUERIES)
                rows = [unit * tokens + j for j in range(tokens)]
                q_of_tokens = [q_smem.at[q_slot, of_token(j)] for j in range(tokens)]
                scales, weights = (
                    [x.at[pl.ds(row * heads, heads)] for row in rows] for x in (q_scale_gmem, weights_gmem)
                )
                if fp4:
                    unpack(unit, q_slot)
                    factors = [scratch["factor"].at[q_slot, of_token(j)] for j in range(tokens)]
                    scales = [scratch["q_scale"].at[q_slot, :, of_token(j)] for j in range(tokens)]
                    queries = Fp4Queries.of(q_of_tokens, factors, scales, weights)
                    score = functools.partial(score_fp4, queries, staged)
                else:
                    score = functools.partial(score_fp8, q_of_tokens, fp8_factors(scales, weights))
                    plgpu.barrier_wait(q_filled.at[q_slot])
                ahead = lax.rem(team + teams - lax.rem(done, teams), teams)  # items before this team's first one

                @pl.loop(0, lax.div(items - ahead + (teams - 1), teams))
                def _items(turn):
                    i = ahead + turn * teams
                    slot = lax.rem(done + i, stages)
                    plgpu.barrier_wait(filled.at[slot])

                    def store(scores):
                        for row, score in zip(rows, scores, strict=True):
                            y_gmem[row, pl.ds((first + i) * ITEM + place, KEYS)] = score

                    buffers = codes_smem.at[slot, held], scale_smem.at[slot, held]
                    score(buffers, lambda: plgpu.barrier_arrive(free.at[slot]), store)

                if not fp4:
                    plgpu.barrier_arrive(q_free.at[q_slot])

            def unpack(unit, q_slot):
                """Consumers share a unit's rows of queries. Who waits for the next unit's is done with the last one."""

                @pl.loop(0, lax.div(unpacked - warpgroup + (consumers - 1), consumers))
                def _rows(turn):
                    first = (warpgroup + turn * consumers) * UNPACKED
                    source, target = (pl.ds(start + first, UNPACKED) for start in (unit * tokens * heads, 0))
                    packed = q_gmem.at[source], q_scale_gmem.at[source], weights_gmem.at[source]
                    q_scale_smem, factor_smem = (
                        scratch["q_scale"].at[q_slot, :, target],
                        scratch["factor"].at[q_slot, target],
                    )
                    unpack_queries(packed, q_smem.at[q_slot, target], q_scale_smem, factor_smem)

                plgpu.commit_smem()
                plgpu.barrier_arrive(q_filled.at[q_slot])
                plgpu.barrier_wait(q_filled.at[q_slot])

            of_this_block(segment)

    y = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch * t, columns), jnp.float32),
        grid=(sms,),
        grid_names=("sm",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(unsafe_no_auto_barriers=True),
        scratch_types=_buffers(heads, keys, tiling)
        | {
            "filled": plgpu.Barrier(num_arrivals=2 * (ITEM // part), num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
            "q_filled": plgpu.Barrier(num_arrivals=consumers if fp4 else tokens, num_barriers=QUERIES),
            "q_free": None if fp4 else plgpu.Barrier(num_arrivals=consumers, num_barriers=QUERIES),
        },
    )(
        q,
        q_scale,
        weights,
        keys.codes,
        keys.scale,
        keys.table,
        counts.reshape(batch * of_batch, tokens),
    )
    return y.reshape(batch, t, columns)


def registers_of(tiling: ScoreTiling) -> tuple[int, int] | None:
    """Of the producer and of a consumer, where those of a launch, 504 or 480 in all, are too few for consumers."""
    if tiling.teams == 2:
        return 64, 104
    return (104, 200) if tiling.tokens > IN_FLIGHT else None


def _buffers(heads: int, keys: Keys, tiling: ScoreTiling) -> dict[str, Any]:
    """Shared memory: queries, keys' codes and scales, and for the interpreter what registers hold otherwise."""
    fp4, e4m3 = keys.codes.dtype == jnp.int32, jnp.float8_e4m3fn
    width = keys.codes.shape[1] * (8 if fp4 else 1)
    swizzle = plgpu.SwizzleTransform(width)
    tiled = plgpu.TilingTransform((8, width)), swizzle
    shape, rows = (tiling.stages, ITEM, keys.codes.shape[1]), tiling.tokens * heads
    q_scale = factor = staged = None
    if fp4:
        # A lane loads a quarter of a key, so that eight lanes, two keys, load from all banks: as it comes is best.
        codes, rows = plgpu.SMEM(shape, jnp.int32), -(-rows // UNPACKED) * UNPACKED
        q_scale, factor = (plgpu.SMEM((QUERIES, *lines, rows), jnp.float32) for lines in ((width // GROUP,), ()))
        if is_interpreted():
            staged = plgpu.SMEM((CONSUMERS * tiling.teams, KEYS, width), e4m3, transforms=tiled)
    else:
        # One memory by two names. Rows are a swizzle wide, so that tiles of eight rows lie as rows do; but a copy that
        # knows of tiles begins at a multiple of eight rows, which a page of 66 or so does not.
        copied, codes = (plgpu.SMEM(shape, e4m3, transforms=how) for how in ((swizzle,), tiled))
        codes = codes if is_interpreted() else plgpu.RefUnion(copied, codes)
    return {
        "q": plgpu.SMEM((QUERIES, rows, width), e4m3, transforms=tiled),
        "q_scale": q_scale,
        "factor": factor,
        "codes": codes,
        "scale": plgpu.SMEM((tiling.stages, ITEM), keys.scale.dtype),
        "staged": staged,
    }

"""The k best entries of each row, in order, ties to the lower index.

Scores become int32 keys that are ordered as they are: one zero, and NaN above infinity. Of a long row only k tiles of
neighbours can hold its k best: those that come first by (largest key down, place up). For if an entry is in none of
them, each of them has one that comes before it. So there are two kernels:

1. Many thread blocks a row: the largest key of every tile (maxima.py). Bound by the scores' bytes.
2. One thread block of some warpgroups a row: the k tiles, their entries that are not below the least of the tiles, and
   the order of these, of which the k best are wanted. A short row is one whose tiles are single entries.

A choice of k of n keys in shared memory: the range from the least to the largest in 256 bins, a count of the keys in
each; then the bin that holds the last one needed in 256 bins, and so on, until a bin holds no more than are needed,
or, of tiles, few more: they do no harm. If equal keys are more than that, the same over indices.
The order of the few that are left: their ranks, from the bins they fall into (rank.py). Where a bin holds many, or they
are many, the k best are chosen first and sorted (sort.py): pairs (key, index) differ, so there is one order.

Bound: 4 N bytes a row / 3.35 TB/s. On an H200, normal scores: 512 of 262144 in 10.5 us (14.9 with a sort), of which the
maxima take 1.4; for 32 rows 20.5 us (27), the maxima 10.3; 512 of 65536 for 32 rows 12.3 us (16.0), 512 of 8192 for 128
rows 8.2 us. Of the second kernel's 15 000 cycles at one row loading the maxima takes 2200, counting them 3000, keeping
the tiles 2900, their entries 3300 and the order 3800. Where scores are rounded to halves, equal keys are told apart by
their indices and the best are sorted: one row of 262144 takes 20 us.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.top_k import rank, team
from pallas_kernels.top_k.look_up import look_up, look_up_four
from pallas_kernels.top_k.maxima import LARGEST, LEAST, WITHOUT_BARRIERS, maxima, ordered
from pallas_kernels.top_k.sort import in_order
from pallas_kernels.top_k.team import LANES, Team
from pallas_kernels.top_k.tiling import RowTiling
from pallas_kernels.top_k.warpgroup import (
    BINS,
    NOWHERE,
    append,
    bound,
    count,
    find,
    in_lanes,
    put,
    width,
)

DIGIT = 8
MOST_ALIKE = 48  # pairs of one bin up to which each is compared with all of them, not sorted
TURNS = 3  # bins: those that are counted in, those of the next time, and those that somebody may still read


def top_k(scores: jax.Array, k: int, counts: jax.Array, tiling: RowTiling) -> jax.Array:
    """`reference.top_k` of scores [rows, C] float32 and counts [rows] int32; tiling.py has the limits."""
    if tiling.tile == 1:
        return choose(scores, scores, counts, k, tiling)
    return choose(scores, maxima(scores, counts, tiling.tile), counts, k, tiling)


class Limit(NamedTuple):
    """What comes first: keys above `least`, and those equal to it whose place is at most `last`."""

    least: jax.Array
    last: jax.Array

    def first(self, key: jax.Array, place: jax.Array) -> jax.Array:
        return (key > self.least) | ((key == self.least) & (place <= self.last))


def choose(scores: jax.Array, tops: jax.Array, counts: jax.Array, k: int, tiling: RowTiling) -> jax.Array:
    """int32 [rows, k] from the maxima of tiles, or from the scores themselves."""
    rows, tile, warpgroups = len(scores), tiling.tile, tiling.warpgroups
    whole = tiling.sorted_entries
    scratch = {
        "all_keys": plgpu.SMEM((tiling.held_keys,), jnp.int32),
        "all_places": plgpu.SMEM((tiling.held_places,), jnp.int32),
        "picked": plgpu.SMEM((tiling.picked,), jnp.int32),
        "bins": plgpu.SMEM((TURNS, BINS + NOWHERE), jnp.int32),
        "state": plgpu.SMEM((6,), jnp.int32),  # one: each takes a kilobyte of shared memory
        **team.scratch(warpgroups),
    }
    if tiling.ranked:
        scratch |= {name: plgpu.SMEM((rank.HELD_BINS,), jnp.int32) for name in ("ranks", "ends")}

    def kernel(
        scores_gmem, tops_gmem, counts_gmem, chosen_gmem,
        *, all_keys, all_places, picked, bins, state, ranks=None, ends=None, barrier=None,
    ):  # fmt: skip
        sizes, bounds = state.at[pl.ds(0, 4)], state.at[pl.ds(4, 2)]
        best_keys, best = (x.at[pl.ds(0, whole)] for x in (all_keys, all_places))
        near_keys, near = (x.at[pl.ds(tiling.near_from, tiling.near)] for x in (all_keys, all_places))
        keys = all_keys.at[pl.ds(tiling.keys_from, tiling.keys)]
        row, of_team = lax.axis_index("row"), Team(lax.axis_index("warpgroup"), warpgroups, barrier)
        scores_of_row, shown = scores_gmem.at[row], jnp.clip(counts_gmem[row], 0, scores.shape[1])

        def each(n: Any, chunk: int, body: Callable[[Any, Any, Any], None]) -> None:
            """body(the slice that is a chunk, the places in it, which are below n)."""

            @pl.loop(0, lax.div(n + warpgroups * chunk - 1, warpgroups * chunk))
            def _chunk(c):
                first = (c * warpgroups + of_team.member) * chunk
                of_chunk = plgpu.broadcasted_iota(jnp.int32, (chunk,), 0, layout=in_lanes(chunk))
                body(pl.ds(first, chunk), first + of_chunk, of_chunk < n - first)

        def loaded(smem: Any, here: Any) -> jax.Array:
            return plgpu.load(smem.at[here], layout=in_lanes(here.size), optimized=False)

        def fill(smem: Any, value: int) -> None:
            (n,) = smem.shape
            smem[...] = plgpu.layout_cast(jnp.full((n,), value, jnp.int32), in_lanes(n))

        def narrowed(n, chunk, values, start, spare):
            """Where the item that is number `need` of the largest is, until those with it are at most `spare` too many.

            The state, from `start` on: the least and the span of the values it is among, the width of a bin, need and
            how many they are, and the turn.
            """

            def body(state):
                base, span, shift, need, _, turn = state

                @pl.when(of_team.member == 0)
                def _clear():
                    fill(bins.at[lax.rem(turn + 1, TURNS)], 0)

                def digits(here, place, inside):
                    x, inside = values(here, place, inside)
                    count(of_team, bins.at[turn], x, inside.astype(jnp.int32), (base, shift, span))

                each(n, chunk, digits)
                of_team.sync()
                found, need, held = find(bins.at[turn], need)
                base, span = base + (found << shift), (jnp.int32(1) << shift) - 1
                shift = jnp.where(shift == 0, -1, jnp.where(shift > DIGIT, shift - DIGIT, 0))
                return base, span, shift, need, held, lax.rem(turn + 1, TURNS)

            def goes_on(state):
                _, _, shift, need, held, _ = state
                return (shift != -1) & (held - need > spare)

            return lax.while_loop(goes_on, body, start)

        def digits_of(base, span, digit=DIGIT):
            bits = width(span)
            return base, span, jnp.where(bits > digit, bits - digit, 0)

        def limit(n, chunk, keys, place_of, low, high, need, turn, spare=0):
            """Of the `need` first of n keys between low and high and `spare` more; and the turn."""
            start = *digits_of(low, high - low), need, n, turn
            least, _, _, need, held, turn = narrowed(
                n, chunk, lambda here, _, inside: (loaded(keys, here), inside), start, spare
            )
            last = scores_of_row.shape[0] - 1

            def equal(here, place, inside):
                return last - place_of(here, place), (loaded(keys, here) == least) & inside

            start = *digits_of(jnp.int32(0), jnp.int32(last)), need, held, turn
            base, *_, turn = narrowed(n, chunk, equal, start, spare)
            return Limit(least, last - base), turn

        def load(here, place, _):
            key = look_up(tops_gmem.at[row], jnp.minimum(place, seen_tiles - 1))
            key = ordered(key) if tile == 1 else key
            keys[here] = key
            bound(of_team, bounds, key)

        def keep_near(where, keys, indices):
            where = [x.astype(jnp.int32) for x in where]
            append(of_team, sizes.at[pl.ds(1, 1)], where, (near_keys, keys), (near, indices))

        def keep_entry(here, place, inside):
            key = loaded(keys, here)
            keep_near([of_tiles.first(key, place) & inside], [key], [place])

        def keep_tile(here, place, inside):
            where = of_tiles.first(loaded(keys, here), place) & inside
            append(of_team, sizes.at[pl.ds(0, 1)], [where.astype(jnp.int32)], (picked, [place]))

        def keep_candidates(_, place, inside):
            """`place` counts four neighbours of a tile, which are loaded at once."""
            at, bits = jnp.where(inside, place, 0), (tile // 4).bit_length() - 1
            first = look_up(picked, at >> bits) * tile + (at & (tile // 4 - 1)) * 4
            keys = [ordered(x) for x in look_up_four(scores_of_row, first)]
            indices = [first + i for i in range(4)]
            pairs = zip(keys, indices, strict=True)
            keep_near([inside & (key >= least) & (index < shown) for key, index in pairs], keys, indices)

        @pl.when(of_team.member == 0)
        def _start():
            fill(bins.at[0], 0)
            if tiling.ranked:
                fill(ranks, 0)
            fill(best_keys, LEAST)
            fill(best, LARGEST)
            for i in range(3):
                sizes[i] = 0
            bounds[0] = LARGEST
            bounds[1] = LEAST

        of_team.sync()
        seen_tiles = lax.div(shown + tile - 1, tile)
        each(seen_tiles, tiling.load, load)
        of_team.sync()
        low, high, need = bounds[0], bounds[1], jnp.minimum(k, seen_tiles)
        of_tiles, turn = limit(
            seen_tiles, tiling.chunk, keys, lambda _, place: place, low, high, need, jnp.int32(0), tiling.spare
        )
        least = jnp.where(seen_tiles < k, LEAST, of_tiles.least)  # fewer tiles: all entries
        if tile == 1:
            each(seen_tiles, tiling.chunk, keep_entry)
        else:
            each(seen_tiles, tiling.chunk, keep_tile)
            of_team.sync()
            each(sizes[0] * (tile // 4), tiling.gather, keep_candidates)
        of_team.sync()
        n, need = sizes[1], jnp.minimum(k, shown)

        def sort():
            of_entries, _ = limit(n, tiling.few, near_keys, lambda here, _: loaded(near, here), least, high, need, turn)

            def keep_best(here, _, inside):
                key, index = loaded(near_keys, here), loaded(near, here)
                where = of_entries.first(key, index) & inside
                append(of_team, sizes.at[pl.ds(2, 1)], [where.astype(jnp.int32)], (best_keys, [key]), (best, [index]))

            each(n, tiling.few, keep_best)
            of_team.sync()
            place, (_, index) = in_order(of_team, whole, all_keys, all_places)
            index = jnp.where(place < shown, index, -1)
            put(of_team, chosen_gmem.at[row], place, index, (place < k).astype(jnp.int32))

        if not tiling.ranked:
            sort()
            return
        ranked_keys, ranked = (x.at[pl.ds(0, tiling.ranked)] for x in (all_keys, all_places))
        base, span, shift = digits_of(least, high - least, rank.DIGIT)
        binning = rank.Binning(base, shift, span)

        def count_near(here, _, inside):
            count(of_team, ranks, loaded(near_keys, here), inside.astype(jnp.int32), binning)

        def put_near(here, _, inside):
            key, index = loaded(near_keys, here), loaded(near, here)
            where = inside.astype(jnp.int32)
            rank.put_down(of_team, ends, binning.of(key), where, (ranked_keys, key), (ranked, index))

        def put_ranked(here, place, _):
            pair = loaded(ranked_keys, here), loaded(ranked, here)
            of_pair = rank.rank_of(ends, ranked_keys, ranked, pair, binning.of(pair[0]), fullest)
            of_pair, index = jnp.where(place < n, of_pair, place), jnp.where(place < n, pair[1], -1)
            put(of_team, chosen_gmem.at[row], of_pair, index, (of_pair < k).astype(jnp.int32))

        each(n, tiling.few, count_near)
        of_team.sync()
        pl.when(of_team.member == 0)(lambda: rank.begin_bins(ranks, ends, sizes.at[pl.ds(3, 1)]))
        of_team.sync()
        fullest = sizes[3]
        few_alike = (n <= tiling.ranked) & (fullest <= MOST_ALIKE)

        @pl.when(few_alike)
        def _rank():
            each(n, tiling.few, put_near)
            of_team.sync()
            each(jnp.maximum(n, k), LANES, put_ranked)

        pl.when(jnp.logical_not(few_alike))(sort)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows, k), jnp.int32),
        grid=(rows,),
        grid_names=("row",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=WITHOUT_BARRIERS,
    )(scores, tops, counts)

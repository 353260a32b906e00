"""The k best entries of each row, in order, ties to the lower index.

Scores become int32 keys that are ordered as they are: one zero, NaN above infinity, and below all what a row does not
show. Of a long row only k tiles of neighbours can hold its k best: those that come first by (largest key down, place
up). For if an entry is in none of them, each of them has one that comes before it. So there are two kernels:

1. Many thread blocks a row: the largest key of every tile. Bound by the scores' bytes.
2. One warpgroup a row: the k tiles, among them the entries not below the least of the tiles, the k best of these, and
   their order. A short row is one whose tiles are single entries.

A choice of k of n keys in shared memory: digits of 8 bits from the highest, for each a count of the keys that have the
digits found so far, until the bin holds no more than are needed; then, if equal keys are more than that, the same over
indices. What is chosen is put down in any order: k pairs (key, index) that differ, so a bitonic sort leaves one order.

Bound: 4 N bytes a row / 3.35 TB/s. Not yet measured.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.top_k.tiling import BLOCK, FEW, RowTiling
from pallas_kernels.top_k.warpgroup import BINS, append, count, exchanged, fetch, find, in_lanes, look_up, put, sync

LEAST, LARGEST = -(2**31), 2**31 - 1
INDICES = 2**24 - 1  # what indices are counted down from: three digits
DIGIT = 8
WITHOUT_BARRIERS = plgpu.CompilerParams(unsafe_no_auto_barriers=True)


def top_k(scores: jax.Array, k: int, counts: jax.Array, tiling: RowTiling) -> jax.Array:
    """`reference.top_k` of scores [rows, C] float32 and counts [rows] int32; tiling.py has the limits."""
    if tiling.tile == 1:
        return choose(scores, scores, counts, k, tiling)
    return choose(scores, maxima(scores, counts, tiling.tile), counts, k, tiling)


def ordered(scores: jax.Array, seen: jax.Array) -> jax.Array:
    """int32 keys of float32 scores, LEAST where they are not seen."""
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    key = bits ^ ((bits >> 31) & LARGEST)
    key = jnp.where(key == -1, 0, key)  # -0
    key = jnp.where(scores != scores, LARGEST, key)
    return jnp.where(seen, key, LEAST)


def maxima(scores: jax.Array, counts: jax.Array, tile: int) -> jax.Array:
    """int32 [rows, C / tile]: the largest key of each tile."""
    rows, columns = scores.shape
    tiles = BLOCK // tile
    shape, lanes = (tiles, tile), tile // 4
    per_warp = 32 // lanes
    tiles_in_warps = plgpu.Tiling(((4 * per_warp, tile), (per_warp, tile), (4,)))
    layout = plgpu.Layout.TILED(tiles_in_warps, (-5,), (-3, -2), -1)

    def kernel(scores_gmem, counts_gmem, maxima_gmem):
        row, first = lax.axis_index("row"), lax.axis_index("block") * tiles
        here = pl.ds(first, tiles)
        x = plgpu.load(scores_gmem.at[row, here], layout=layout, optimized=False)
        place = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) * tile
        place = place + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
        seen = place < counts_gmem[row] - first * tile
        maxima_gmem[row, here] = jnp.max(ordered(x, seen), axis=1)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows, columns // tile), jnp.int32),
        grid=(rows, columns // BLOCK),
        grid_names=("row", "block"),
        compiler_params=WITHOUT_BARRIERS,
    )(scores.reshape(rows, columns // tile, tile), counts)


def choose(scores: jax.Array, tops: jax.Array, counts: jax.Array, k: int, tiling: RowTiling) -> jax.Array:
    """int32 [rows, k] from the maxima of tiles, or from the scores themselves."""
    rows, tile = len(scores), tiling.tile
    tiles = tops.shape[1]
    taken = min(k, tiles)
    whole = tiling.sorted_entries
    candidates = taken * tile
    scratch = {
        "keys": plgpu.SMEM((tiling.held_keys,), jnp.int32),
        "places": plgpu.SMEM((tiling.held_places,), jnp.int32),
        "best_keys": plgpu.SMEM((whole,), jnp.int32),
        "best": plgpu.SMEM((whole,), jnp.int32),
        "bins": plgpu.SMEM((BINS,), jnp.int32),
        "size": plgpu.SMEM((8,), jnp.int32),
    }

    def kernel(scores_gmem, tops_gmem, counts_gmem, chosen_gmem, *, keys, places, best_keys, best, bins, size):
        row = lax.axis_index("row")
        of_row = scores_gmem.at[row]
        shown = counts_gmem[row]

        def each(n: Any, chunk: int, body: Callable[[Any, Any], None]) -> None:
            """body(the slice that is a chunk, the places in it)."""

            @pl.loop(0, lax.div(n + chunk - 1, chunk))
            def _chunk(c):
                of_chunk = plgpu.broadcasted_iota(jnp.int32, (chunk,), 0, layout=in_lanes(chunk))
                body(pl.ds(c * chunk, chunk), c * chunk + of_chunk)

        def loaded(smem: Any, here: Any) -> jax.Array:
            return plgpu.load(smem.at[here], layout=in_lanes(here.size), optimized=False)

        def load(here, place):
            keys[here] = ordered(look_up(of_row, jnp.minimum(place, tiles - 1)), place < jnp.minimum(shown, tiles))

        def narrowed(n, chunk, state, values):
            """Digits of the value that item `need` of the n largest has; state: value, shift, need, as many as it."""

            def body(state):
                value, shift, need, _ = state
                sync()
                bins[...] = plgpu.layout_cast(jnp.zeros((BINS,), jnp.int32), in_lanes(BINS))
                sync()

                def digits(here, place):
                    x, inside = values(here, place)
                    digit = lax.shift_right_logical(x ^ value, shift)  # more than one where earlier ones differ
                    count(bins, digit, (inside & ((digit & -BINS) == 0)).astype(jnp.int32))

                each(n, chunk, digits)
                sync()
                found, need, held = find(bins, need)
                return value ^ (found << shift), shift - DIGIT, need, held

            return lax.while_loop(lambda state: (state[1] >= 0) & (state[2] < state[3]), body, state)

        def best_of(n, chunk, need, index_of):
            """Which of the n keys are the `need` first: the least of them, and a function of keys and indices."""
            start = jnp.int32(LEAST), jnp.int32(24), need, n
            least, _, need, held = narrowed(n, chunk, start, lambda here, place: (loaded(keys, here), place < n))

            def equal(here, place):
                return INDICES - index_of(here, place), (loaded(keys, here) == least) & (place < n)

            last, *_ = narrowed(n, chunk, (jnp.int32(0), jnp.int32(16), need, held), equal)
            return least, lambda key, index: (key > least) | ((key == least) & (INDICES - index >= last))

        if whole != k:
            best_keys[...] = plgpu.layout_cast(jnp.full((whole,), LEAST, jnp.int32), in_lanes(whole))
        size[0] = 0
        size[1] = 0
        if tile == 1:
            each(tiles, tiling.chunk, load)
        else:
            fetch(tops_gmem.at[row], keys)
        sync()
        least, first = best_of(jnp.int32(tiles), tiling.chunk, jnp.int32(taken), lambda _, place: place)
        if tile == 1:

            def keep(here, place):
                key = loaded(keys, here)
                chosen = first(key, place) & (place < tiles)
                append(size, chosen.astype(jnp.int32), (best_keys, key), (best, place))

            each(tiles, tiling.chunk, keep)
        else:

            def keep_tile(here, place):
                chosen = first(loaded(keys, here), place) & (place < tiles)
                append(size, chosen.astype(jnp.int32), (best, place))

            def keep_candidate(_, place):
                safe = jnp.minimum(place, candidates - 1)
                index = look_up(best, lax.div(safe, tile)) * tile + lax.rem(safe, tile)
                key = ordered(look_up(of_row, index), index < shown)
                chosen = (key >= least) & (place < candidates)
                append(size.at[pl.ds(1, 1)], chosen.astype(jnp.int32), (keys, key), (places, index))

            def keep(here, place):
                key, index = loaded(keys, here), loaded(places, here)
                chosen = first(key, index) & (place < held)
                append(size.at[pl.ds(2, 1)], chosen.astype(jnp.int32), (best_keys, key), (best, index))

            each(tiles, tiling.chunk, keep_tile)
            sync()
            each(candidates, tiling.chunk, keep_candidate)
            size[2] = 0
            sync()
            held, few = size[1], min(tiling.chunk, FEW)
            _, first = best_of(held, few, jnp.int32(k), lambda here, _: loaded(places, here))
            each(held, few, keep)
        sync()
        layout_best = in_lanes(whole)
        rank = plgpu.broadcasted_iota(jnp.int32, (whole,), 0, layout=layout_best)
        key = plgpu.load(best_keys, layout=layout_best, optimized=False)
        index = plgpu.load(best, layout=layout_best, optimized=False)
        index = jnp.where(rank < k, index, INDICES)
        _, index = in_order(key, index, rank, best_keys, best)
        put(chosen_gmem.at[row], rank, jnp.where(rank < shown, index, -1), (rank < k).astype(jnp.int32))

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows, k), jnp.int32),
        grid=(rows,),
        grid_names=("row",),
        scratch_types=scratch,
        compiler_params=WITHOUT_BARRIERS,
    )(scores, tops, counts)


def in_order(key: jax.Array, index: jax.Array, rank: jax.Array, *smem: Any) -> tuple[jax.Array, jax.Array]:
    """Bitonic sort of pairs: larger keys first, then lower indices."""
    size = 2
    while size <= len(rank):
        distance = size // 2
        while distance:
            other_key, other_index = (exchanged(x, distance, at) for x, at in zip((key, index), smem, strict=True))
            before = (key > other_key) | ((key == other_key) & (index < other_index))
            wanted = ((rank & distance) == 0) == ((rank & size) == 0)
            keep = before == wanted
            key, index = jnp.where(keep, key, other_key), jnp.where(keep, index, other_index)
            distance //= 2
        size *= 2
    return key, index

"""Where the entries are that a query names, in the Hopper kernel of sparse attention."""

# Pallas' transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.sparse_attention import gather_sm90 as gather
from pallas_kernels.sparse_attention.held_sm90 import Held, Loads, Parts, Words

BLOCK = 64  # entries that are multiplied at once


@dataclass(frozen=True)
class Layout:
    """How entries are found: in pages of `page_size` (None: a sequence is a page) and where in them; and at most how
    many of them a query names.
    """

    parts: Parts
    page_size: int | None
    most: int


class Source(NamedTuple):
    """Entries, and which of them a query names.

    arrays: what holds their bytes. table int32 [B, n]: the page of entries i * page_size .. of a sequence; None where
    entries are numbered through all pages, or a sequence is a page. names int32 [N, W], W a multiple of ROWS, or None
    for the first ones; -1 is none. counts int32 [N]: how many entries of the list there are, None for all.
    """

    arrays: tuple[jax.Array, ...]
    table: jax.Array | None
    names: jax.Array | None
    counts: jax.Array | None


class Named:
    """What a thread block reads of a query's entries: those of part `part`, in blocks of BLOCK."""

    def __init__(self, layouts, sources_gmem, query, tokens, part, parts):
        self.query, self.sequence = query, lax.div(query, tokens)
        limits = [limit(layout, source, query) for layout, source in zip(layouts, sources_gmem, strict=True)]
        self.each = list(zip(layouts, sources_gmem, limits, strict=True))
        self.first_blocks = blocks(limits[0])
        total = functools.reduce(jnp.add, map(blocks, limits))
        self.first = lax.div(total * part, parts)
        self.blocks = lax.div(total * (part + 1), parts) - self.first

    def stream(self, part: jax.Array, put: Callable[..., None]) -> None:
        """put(i, words, load, row) of part `part` of every block i, see `convert_sm90.put`.

        Names are read three blocks ahead, rows one; what is two blocks ahead is on its way to the L2 cache.
        """

        def of_block(i, function):
            """function(layout, source, limit, start) of the source that block i is in."""
            start = (i + self.first) * BLOCK + part * gather.ROWS
            return of_source(function, self.each, self.first_blocks * BLOCK, start)

        def name(i):
            return of_block(i, lambda _layout, source, _limit, start: named(gather.HELD, source, self.query, start))

        def find(i, numbers):
            def at(layout, source, limit, start):
                seen = jnp.where(position(gather.HELD, start) < limit, numbers, -1)
                found = place(layout, source, self.sequence, seen)
                gather.HELD.prefetch(source.arrays, layout.parts, *found)
                return found

            return of_block(i, at)

        layouts, sources, _ = zip(*self.each, strict=True)
        pieces = [gather.HELD.pieces(layout.parts) for layout in layouts]

        def load(i, at) -> Loads:
            """What loads the words of block i."""
            behind = (i + self.first >= self.first_blocks).astype(jnp.int32)
            arrays = [source.arrays for source in sources]
            of_each = (zip(*of_sources, strict=True) for of_sources in zip(*pieces, strict=True))
            return Loads(
                *(
                    tuple(functools.partial(gather.HELD.load, arrays, x, [at] * len(arrays), behind) for x in kind)
                    for kind in of_each
                )
            )

        def step(i, state):
            words, here, following, numbers = state
            put(i, words, load(i, here), here[1])
            if held_ahead:  # behind the fence of `put`, which waits for what is asked for before it
                with jax.named_scope("load"):
                    words = loaded(load(i + 1, following))
            with jax.named_scope("look up"):
                return words, kept(following), find(i + 2, numbers), name(i + 3)

        held_ahead = layouts[0].parts.codes is not None

        def kept(at):
            """Of the place of rows, what is needed once they are loaded: all of it where that is yet to come."""
            return (None, at[1]) if held_ahead else at

        def loaded(load: Loads) -> Words:
            return Words(*(sum((f() for f in kind), ()) for kind in load))

        @pl.when(self.blocks > 0)
        def _all():
            numbers = [name(jnp.int32(i)) for i in range(3)]
            first = find(jnp.int32(0), numbers[0])
            words = Words((), (), ())
            if held_ahead:  # before the next ones are looked up, which waits for their names
                words = loaded(load(jnp.int32(0), first))
            following = find(jnp.int32(1), numbers[1])
            lax.fori_loop(0, self.blocks, step, (words, kept(first), following, numbers[2]))


def of_source(
    function: Callable[..., Any], each: Sequence[tuple[Any, ...]], behind: jax.Array, start: jax.Array
) -> Any:
    """function(layout, source, limit, start) of the one of one or two sources that `start` is in; the second one's
    entries begin at `behind`.
    """
    branches = [functools.partial(function, *of_one) for of_one in each]
    if len(branches) == 1:
        return branches[0](start)
    return lax.cond(start < behind, branches[0], lambda start: branches[1](start - behind), start)


def limit(layout: Layout, source: Source, query: jax.Array) -> jax.Array:
    """How many entries the query names, those that are -1 included."""
    if source.counts is None:
        return jnp.int32(layout.most)
    return jnp.minimum(jnp.maximum(source.counts[query], 0), layout.most)


def blocks(entries: jax.Array) -> jax.Array:
    return lax.div(entries + (BLOCK - 1), BLOCK)


def position(held: Held, start: jax.Array) -> jax.Array:
    return start + plgpu.broadcasted_iota(jnp.int32, (held.rows,), 0, layout=held.each_row)


def named(held: Held, source: Source, query: jax.Array, start: jax.Array) -> jax.Array:
    """The entries at start .. start + held.rows of the query's list; anything behind its end."""
    if source.names is None:
        return position(held, start)
    start = jnp.minimum(start, source.names.shape[-1] - held.rows)
    names_gmem: Any = source.names
    return plgpu.load(names_gmem.at[query, pl.ds(start, held.rows)], layout=held.each_row, optimized=False)


def place(layout: Layout, source: Source, sequence: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Page and row of numbered entries; the row of none is -1."""
    some = jnp.maximum(number, 0)
    if layout.page_size is None:
        page, row = plgpu.layout_cast(jnp.broadcast_to(sequence, number.shape), gather.EACH_ROW), some
    else:
        page, row = lax.div(some, layout.page_size), lax.rem(some, layout.page_size)
        if source.table is not None:
            page = gather.HELD.look_up(source.table, sequence, page)
    return page, jnp.where(number < 0, -1, row)

"""Where the entries are that a query names, in the Hopper kernel of sparse attention."""

# Pallas' transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.sparse_attention.entries_sm90 import Layout, Source, blocks, limit, named, of_source, position
from pallas_kernels.sparse_attention.held_sm90 import Loads
from pallas_kernels.sparse_attention.many import gather_sm90 as gather

BLOCK = gather.ROWS  # entries that are multiplied at once


class Named:
    """What a thread block reads: a query's entries, in blocks of BLOCK."""

    def __init__(self, layouts, sources_gmem, query, tokens):
        self.query, self.sequence = query, lax.div(query, tokens)
        limits = [limit(layout, source, query) for layout, source in zip(layouts, sources_gmem, strict=True)]
        self.each = list(zip(layouts, sources_gmem, limits, strict=True))
        self.parts = layouts[0].parts
        self.first_blocks = blocks(limits[0])
        self.blocks = functools.reduce(jnp.add, map(blocks, limits))

    def names(self, i: jax.Array) -> jax.Array:
        """The numbers of the entries of block i, anything where it has fewer."""
        return self._of_block(i, lambda _layout, source, _limit, start: named(gather.HELD, source, self.query, start))

    def find(self, i: jax.Array, numbers: jax.Array) -> jax.Array:
        """Where block i lies, whose numbers these are: int32 [BLOCK], counted through all pages, and -1 for none."""

        def find(layout: Layout, source: Source, limit: jax.Array, start: jax.Array) -> jax.Array:
            limit = jnp.where(i < self.blocks, limit, 0)  # of blocks that there are not, none is seen
            return slot(layout, source, self.sequence, jnp.where(position(gather.HELD, start) < limit, numbers, -1))

        return self._of_block(i, find)

    def ask(self, i: jax.Array) -> None:
        """Asks for block i, as far as the L2 cache."""
        slots = self.find(i, self.names(i))

        def ask(layout: Layout, source: Source, _limit: jax.Array, _start: jax.Array) -> None:
            gather.HELD.prefetch(source.arrays, layout.parts, *place(layout, self.sequence, slots))

        self._of_block(i, ask)

    def loads(self, i: jax.Array, slots: jax.Array) -> Loads:
        """What loads block i, which lies there."""
        layouts, sources, _ = zip(*self.each, strict=True)
        of_sources = [gather.HELD.pieces(layout.parts) for layout in layouts]
        second = (i >= self.first_blocks).astype(jnp.int32)
        arrays = [source.arrays for source in sources]
        places = [place(layout, self.sequence, slots) for layout in layouts]
        of_each = (zip(*of_kind, strict=True) for of_kind in zip(*of_sources, strict=True))
        return Loads(
            *(tuple(functools.partial(gather.HELD.load, arrays, x, places, second) for x in kind) for kind in of_each)
        )

    def _of_block(self, i: jax.Array, function: Callable[..., Any]) -> Any:
        """function(layout, source, limit, start) of the source that block i is in."""
        return of_source(function, self.each, self.first_blocks * BLOCK, i * BLOCK)


def slot(layout: Layout, source: Source, sequence: jax.Array, number: jax.Array) -> jax.Array:
    """Where numbered entries lie, counted through all pages; -1 for none."""
    some = jnp.maximum(number, 0)
    if layout.page_size is not None and source.table is not None:
        page = gather.HELD.look_up(source.table, sequence, lax.div(some, layout.page_size))
        some = page * layout.page_size + lax.rem(some, layout.page_size)
    return jnp.where(number < 0, -1, some)


def place(layout: Layout, sequence: jax.Array, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Page and row; the row of none is -1."""
    if layout.page_size is None:
        return plgpu.layout_cast(jnp.broadcast_to(sequence, slots.shape), gather.EACH_ROW), slots
    some = jnp.maximum(slots, 0)
    # Not slots < 0: what a loop carries has lost its sign for comparisons.
    return lax.div(some, layout.page_size), jnp.where(slots == -1, -1, lax.rem(some, layout.page_size))

"""Rows of many sequences in the pages of one pool: what a cache of unknown lengths is, and what kernels read.

A row is named by its number in its sequence; the table says which page holds it. Pages of quantised rows are the bytes
that pallas_kernels.quant.pages lists, pages of plain rows are arrays of them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.quant.pages import pack_pages, page_bytes, page_layout, rows_of_bytes
from pallas_kernels.quant.rows import Rows, empty_rows
from pallas_kernels.row_format import RowFormat
from pallas_kernels.typing import typed


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["pool", "table"], meta_fields=["format", "width", "page_size"]
)
@dataclasses.dataclass(frozen=True)
class Pages:
    """Rows [B, n * page_size, width] of B sequences, n pages each.

    pool: uint8 [pages, bytes] of a quantised format, [pages, page_size, width] of a plain one. table int32 [B, n]: the
    page of rows i * page_size .. of each sequence; pages of rows that nobody asks for may be anything. None: rows are
    numbered through the pool (page * page_size + place in it), alike for every sequence.
    """

    pool: Any
    table: Any
    format: RowFormat
    width: int
    page_size: int

    @property
    def rows(self) -> int:
        """Rows a sequence can name."""
        return (self.pool.shape[0] if self.table is None else self.table.shape[1]) * self.page_size


def require_pages(pages: Pages, name: str) -> None:
    """Raises ValueError, naming the pages, where pool or table are not what their format says: kernels read both by
    address, and would read something else.
    """
    pool, table = pages.pool, pages.table
    if pages.format.quant is None:
        wanted, dtype = (pages.page_size, pages.width), jnp.dtype(pages.format.plain)
    else:
        wanted, dtype = (page_bytes(pages.format, pages.width, pages.page_size),), jnp.dtype(jnp.uint8)
    if pool.shape[1:] != wanted or pool.dtype != dtype:
        raise ValueError(
            f"{name}: the pool is {pool.dtype} of pages {pool.shape[1:]}; {pages.page_size} rows of {pages.width} "
            f"channels in this format take {dtype} {wanted}, see quant.paged"
        )
    if table is not None and (table.ndim != 2 or table.dtype != jnp.int32):
        raise ValueError(f"{name}: the table is {table.dtype} of shape {table.shape}; it is int32 [B, n]")


def require_rows(rows: Rows, name: str) -> None:
    """`require_pages` of rows."""
    wanted = jax.eval_shape(lambda: empty_rows(rows.format, rows.shape))
    for leaf in ("body", "tail", "scale"):
        found, want = getattr(rows, leaf), getattr(wanted, leaf)
        if (found is None) != (want is None) or (
            want is not None and (found.shape, found.dtype) != (want.shape, want.dtype)
        ):
            shown = [None if x is None else f"{x.dtype} {x.shape}" for x in (found, want)]
            raise ValueError(f"{name}: the {leaf} is {shown[0]}; rows {rows.shape} in this format have {shown[1]}")


def outline(entries: jax.Array | Rows | Pages, name: str) -> tuple[int | None, int]:
    """Sequences and channels of an array [B, N, K], Rows or Pages; None where pages are one sequence's, or nobody's.

    Raises ValueError, naming them, for rows and pages that are not what their format says.
    """
    if isinstance(entries, Rows):
        require_rows(entries, name)
    if not isinstance(entries, Pages):
        return entries.shape[0], entries.shape[-1]
    require_pages(entries, name)
    return None if entries.table is None else entries.table.shape[0], entries.width


def paged(rows: Rows, page_size: int, table: jax.Array | None = None) -> Pages:
    """Rows [B, N, width] put into pages: those of sequence b one after the other, or where `table` [B, n] says.

    The pool has as many pages as all sequences need together; `table` must be a permutation of them.
    """
    batch, _, width = rows.shape
    if rows.format.quant is None:
        missing = -rows.shape[1] % page_size
        filled = jnp.pad(rows.body, ((0, 0), (0, missing), (0, 0)))
        pages = filled.reshape(batch, -1, page_size, width)
    else:
        pages = pack_pages(rows, page_size)
    count = pages.shape[1]
    if table is None:
        table = jnp.arange(batch * count, dtype=jnp.int32).reshape(batch, count)
    flat = pages.reshape(batch * count, *pages.shape[2:])
    return Pages(jnp.zeros_like(flat).at[table.reshape(-1)].set(flat), table, rows.format, width, page_size)


@typed
def take_paged(pages: Pages, index: Int[Array, "B N"]) -> Rows:
    """The rows [B, N, width] numbered `index`, each 0 <= index < pages.rows."""
    page, place = index // pages.page_size, index % pages.page_size
    if pages.table is not None:
        page = jnp.take_along_axis(pages.table, page, axis=1)
    if pages.format.quant is None:
        return Rows(pages.pool[page, place], None, None, pages.format)
    data, scales = page_layout(pages.format, pages.width)

    def plane(begin: int, size: int) -> jax.Array:
        return pages.pool[page[..., None], begin + place[..., None] * size + jnp.arange(size)[None, None]]

    return rows_of_bytes(plane(0, data), plane(pages.page_size * data, scales), pages.format)

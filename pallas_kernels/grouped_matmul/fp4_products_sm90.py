"""The products of one consumer of fp4_sm90: codes made E4M3 in registers, multiplied, and added to its sums.

A consumer has `parts` slabs of 64 rows of every weight, and float32 sums [64, rows] of each. A stage brings `blocks` K
blocks, so that a stage is slabs x blocks products of 64 x `rows` x 128, or four times as many of 32 columns.
"""

# Pallas looks abstract where it is not: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.pallas.mosaic_gpu.primitives import wgmma_accumulator_load

from pallas_kernels.block_matmul.pipeline_sm90 import BLOCK, COLUMNS, WGMMA_ROWS
from pallas_kernels.grouped_matmul.tiling import AHEAD
from pallas_kernels.mosaic import e2m1_apart, fresh_wgmma
from pallas_kernels.mosaic import e2m1_folded as e2m1

LINE = 256  # columns in the 128 bytes of a swizzled row of packed weights, at most
TOKENS = COLUMNS  # the layout of a vector with one element a token
Sums = tuple[jax.Array, ...]


class Slab(NamedTuple):
    """64 rows of one weight in memory of this consumer: packed codes by buffer, scales by buffer, and their tables."""

    packed: Any
    scales: Any
    tables: Any


class Tokens(NamedTuple):
    """Codes [rows, columns] of a stage, and the scales of K block b, [rows] by token, float32 or its bits."""

    codes: Any
    scales: Callable[[int], jax.Array]


class Products(NamedTuple):
    """Of a consumer. staged: for the interpreter. blocks: of a stage."""

    slabs: Sequence[Slab]
    staged: Any
    rows: int
    blocks: int

    @property
    def order(self) -> list[tuple[int, int]]:
        """Slabs and K blocks of a stage: a line of packed codes is loaded once, and x is near."""
        line = min(self.blocks, LINE // BLOCK)
        return [
            (at, b)
            for first in range(0, self.blocks, line)
            for at in range(len(self.slabs))
            for b in range(first, first + line)
        ]

    def folded(self, slot: Any, tokens: Tokens, inside: Any, beyond: Any, sums: Sums) -> tuple[Any, Sums]:
        """A stage with tables, `inside` of the columns whose scales are there.

        beyond: whether scales of these columns are too far apart for one pass, found where inside is 0.
        """
        slabs, first_block = self.slabs, inside * self.blocks
        beyond = lax.cond(
            inside == 0, lambda: e2m1.any_beyond([slab.scales.at[slot] for slab in slabs]), lambda: beyond
        )

        def one_pass(group, sums):
            @pl.when((inside == 0) & (beyond == 0))
            def _folded():
                for slab in slabs:
                    e2m1.store_folded_tables(slab.tables, slab.scales.at[slot])

            @pl.when(beyond != 0)
            def _of_one():
                for slab in slabs:
                    e2m1.store_tables_of_one(slab.tables, slab.scales.at[slot], group)

            multiply = self.ahead if self.rows * len(slabs) <= AHEAD else self.one_by_one
            return multiply(slot, tokens, first_block, sums)

        return beyond, lax.fori_loop(0, 1 + (e2m1.GROUPS - 1) * beyond, one_pass, sums)

    def look_up(self, slot: Any, first_block: Any, at: int, b: int, lines: dict[int, Any]) -> tuple[Any, Any]:
        """Codes of K block b of a slab, and the scales of its rows."""
        tables, scales = e2m1.load_tables(self.slabs[at].tables, first_block + b)
        return e2m1.look_up(*self.packed(slot, at, b, lines), tables), scales

    def packed(self, slot: Any, at: int, b: int, lines: dict[int, Any]) -> tuple[Any, int]:
        """The line that has K block b of a slab, and its place there; `lines` keeps them for neighbours."""
        line = min(self.blocks, LINE // BLOCK)
        if b % line == 0:
            columns = pl.ds(b * BLOCK // 2, line * BLOCK // 2)
            lines[at] = e2m1.load_packed(self.slabs[at].packed.at[slot, :, columns])
        return lines[at], b % line

    def apart(self, slot: Any, tokens: Tokens, inside: Any, beyond: Any, sums: Sums) -> tuple[Any, Sums]:
        """The same, a product for every 32 columns; those of a block are issued before the last block's are added."""

        @pl.when(inside == 0)
        def _scales():
            for slab in self.slabs:
                e2m1_apart.store_scales(slab.tables, slab.scales.at[slot])

        first_block = inside * self.blocks
        added, lines, before = list(sums), {}, None

        def add(at: int, b: int, products: Any, left: int) -> None:
            of_tokens = tokens.scales(b)
            of_groups = e2m1_apart.load_scales(self.slabs[at].tables, first_block + b)
            for product, of_rows in zip(fresh_wgmma.wait(products, left), of_groups, strict=True):
                added[at] = added[at] + product * e2m1.scale_products(of_rows, of_tokens)

        for at, b in self.order:
            codes = e2m1_apart.spread(*self.packed(slot, at, b, lines))
            products = e2m1_apart.start(codes, tokens.codes.at[:, pl.ds(b * BLOCK, BLOCK)])
            if before is not None:
                add(*before, left=1)
            before = at, b, products
        assert before is not None
        add(*before, left=0)
        return beyond, tuple(added)

    def operand(self, tokens: Tokens, b: int) -> Any:
        return tokens.codes.at[:, pl.ds(b * BLOCK, BLOCK)].T

    def scaled(self, product: jax.Array, scales: Any, tokens: Tokens, b: int) -> jax.Array:
        return product * e2m1.scale_products(scales, tokens.scales(b))

    def ahead(self, slot: Any, tokens: Tokens, first_block: Any, sums: Sums) -> Sums:
        """Of few rows: a product is issued before the last is added, for registers hold both."""
        order = self.order

        def multiply(*accumulators):
            added, lines = list(sums), {}

            def add(i: int, in_flight: int) -> None:
                at, b = order[i]
                product = wgmma_accumulator_load(accumulators[i], wait_n=in_flight)
                added[at] = added[at] + self.scaled(product, scales[i], tokens, b)

            codes, *scales = self.look_up(slot, first_block, *order[0], lines)
            for i, (_, b) in enumerate(order):
                e2m1.multiply(accumulators[i], codes, self.operand(tokens, b), self.staged)
                if order[i + 1 :]:
                    codes, following = self.look_up(slot, first_block, *order[i + 1], lines)
                    scales.append(following)
                if i > 0:
                    add(i - 1, in_flight=1)
            add(len(order) - 1, in_flight=0)
            return tuple(added)

        # The last to be made is written zeros, the others are not: it is a small one, and unused.
        shapes = [(WGMMA_ROWS, self.rows)] * len(order) + [(WGMMA_ROWS, 8)]
        return pl.run_scoped(multiply, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))

    def one_by_one(self, slot: Any, tokens: Tokens, first_block: Any, sums: Sums) -> Sums:
        """Of many rows: a product is added before the next is looked up; meanwhile the other consumer multiplies."""
        added, lines = list(sums), {}
        for at, b in self.order:
            codes, scales = self.look_up(slot, first_block, at, b, lines)

            def multiply(accumulator, codes=codes, b=b):
                e2m1.multiply(accumulator, codes, self.operand(tokens, b), self.staged)
                return wgmma_accumulator_load(accumulator, wait_n=0)

            product = pl.run_scoped(multiply, plgpu.ACC((WGMMA_ROWS, self.rows), jnp.float32))
            added[at] = added[at] + self.scaled(product, scales, tokens, b)
        return tuple(added)

"""The sizes that follow from a problem and the tiling of kernel_sm90."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

from pallas_kernels.block_matmul.problem import BLOCK, WGMMA_ROWS
from pallas_kernels.block_matmul.tiling import ManyRows

CONSUMERS = 2
LEAST_STORED = 16  # columns at a time: a swizzled row of 32 bytes of bfloat16


@dataclass(frozen=True)
class Cut:
    """`count` products [m, n] of depth k, as a tiling cuts them up. Raises AssertionError where it does not fit.

    A consumer has rows x columns of a tile, in `parts` of 64 rows. steps: K blocks of a thread block. products: of an
    iteration, as (K block, part, weight). finished: columns that a consumer finishes, where thread blocks share K; they
    go out in `pieces`, one being copied while the next is written.
    """

    m: int
    n: int
    k: int
    count: int
    tiling: ManyRows

    def __post_init__(self) -> None:
        t, (down, across) = self.tiling, self.across
        whole = (t.tile_m * down, t.tile_n * across, BLOCK * t.blocks * t.shares)
        assert (self.m % whole[0], self.n % whole[1], self.k % whole[2]) == (0, 0, 0), f"{self} does not fit"
        assert self.by_rows or self.count == 1, "the consumers of several weights share their columns"
        assert t.cluster == 1 or t.shares == 1, "a cluster shares an operand or K"
        assert len(self.products) % t.in_flight == 0, f"{len(self.products)} products in groups of {t.in_flight}"

    @property
    def by_rows(self) -> bool:
        return self.tiling.split == "rows"

    @property
    def across(self) -> tuple[int, int]:
        """Tiles of a cluster, down the rows and along the columns."""
        return (self.tiling.cluster, 1) if self.tiling.cluster_along == "rows" else (1, self.tiling.cluster)

    @property
    def row_tiles(self) -> int:
        return self.m // self.tiling.tile_m

    @property
    def column_tiles(self) -> int:
        return self.n // self.tiling.tile_n

    @property
    def rows(self) -> int:
        return self.tiling.tile_m // (CONSUMERS if self.by_rows else 1)

    @property
    def columns(self) -> int:
        return self.tiling.tile_n // (1 if self.by_rows else CONSUMERS)

    @property
    def parts(self) -> int:
        return self.rows // WGMMA_ROWS

    @property
    def steps(self) -> int:
        return self.k // BLOCK // self.tiling.shares

    @cached_property
    def products(self) -> list[tuple[int, int, int]]:
        return list(itertools.product(range(self.tiling.blocks), range(self.parts), range(self.count)))

    @property
    def finished(self) -> int:
        return self.columns // self.tiling.shares

    @property
    def pieces(self) -> int:
        return 2 if self.finished >= 2 * LEAST_STORED else 1

    @property
    def stored(self) -> int:
        """Columns of a piece."""
        return self.finished // self.pieces

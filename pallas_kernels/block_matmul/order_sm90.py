"""In which order the thread blocks of kernel_sm90 take output tiles, and whose rows a tile has."""

# Pallas's types cannot be followed.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_matmul.cut import Cut


@dataclass(frozen=True)
class Order:
    """Of the tiles that `cut` makes: consecutive ones meet in the L2 cache.

    expert_gmem int32 [blocks]: the expert of each block of rows, of which there are count_gmem int32 [1] and each is
    that of the tiles of a cluster; None where rows are not grouped. experts: how many there are.
    """

    cut: Cut
    expert_gmem: Any
    count_gmem: Any
    experts: int

    @property
    def _grid(self) -> tuple[Any, int]:
        """Of clusters, down the rows and along the columns."""
        down, across = self.cut.across
        rows = self.cut.row_tiles // down if self.count_gmem is None else self.count_gmem[0]
        return rows, self.cut.column_tiles // across

    @property
    def count(self) -> Any:
        rows, columns = self._grid
        return rows * columns

    def tile(self, index: Any) -> tuple[jax.Array, jax.Array]:
        """Row and column of this thread block's tile in cluster `index`."""
        # Rows of one expert are neighbours: in one tile of the order they read its weights once.
        tiling = self.cut.tiling
        row, column = plgpu.planar_snake(index, self._grid, 0 if tiling.rows_first else 1, tiling.width)
        of_cluster = 0 if tiling.cluster == 1 else lax.axis_index("block")
        down, across = self.cut.across
        return row * down + (of_cluster if down > 1 else 0), column * across + (of_cluster if across > 1 else 0)

    def found(self, index: Any) -> tuple[tuple[jax.Array, jax.Array], Any]:
        """The tile and whose rows it has, which is looked up; behind the last tile, any that there is."""
        row, column = self.tile(jnp.minimum(index, self.count - 1))
        if self.expert_gmem is None:
            return (row, column), ()
        row, column = (jnp.where(self.count == 0, 0, x) for x in (row, column))
        # Where no block is real, nobody has said whose it is.
        expert = self.expert_gmem[lax.div(row, jnp.int32(self.cut.across[0]))]
        return (row, column), jnp.clip(expert, 0, self.experts - 1)

    def of_expert(self, gmem: Any, expert: Any) -> Any:
        """What belongs to an expert that `found` found, of [experts, ..]; all of it where rows are not grouped."""
        return gmem if self.expert_gmem is None else gmem.at[expert]

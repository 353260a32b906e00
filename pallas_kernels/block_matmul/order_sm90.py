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

    real: clusters down the rows that there are. expert_gmem int32 [clusters]: whose rows each has, one of `experts`;
    None where rows are not grouped.
    """

    cut: Cut
    real: Any
    expert_gmem: Any
    experts: int

    @property
    def count(self) -> Any:
        """Of tiles, for each thread block of a cluster."""
        return self.real * self._columns

    @property
    def _columns(self) -> int:
        return self.cut.column_tiles // self.cut.across[1]

    def look_up(self, index: Any) -> tuple[Any, Any, Any]:
        """Row and column of this thread block's tile in cluster `index`, and whose rows it has, () where they are not
        grouped. Behind the last tile one that there is, where there are none row 0 and any expert.
        """
        # Rows of one expert are neighbours: in one tile of the order they read its weights once.
        tiling, (down, across) = self.cut.tiling, self.cut.across
        grid = jnp.maximum(self.real, 1), self._columns
        index = jnp.clip(index, 0, grid[0] * grid[1] - 1)
        row, column = plgpu.planar_snake(index, grid, 0 if tiling.rows_first else 1, tiling.width)
        expert = ()
        if self.expert_gmem is not None:
            # Where no row is real, nobody has said whose it is.
            expert = jnp.clip(self.expert_gmem[row], 0, self.experts - 1)
        of_cluster = 0 if tiling.cluster == 1 else lax.axis_index("block")
        return row * down + (of_cluster if down > 1 else 0), column * across + (of_cluster if across > 1 else 0), expert

    def of_expert(self, gmem: Any, expert: jax.Array | tuple[()]) -> Any:
        """Of what all experts have, [experts, ..], what belongs to one; all of it where rows are not grouped."""
        return gmem if self.expert_gmem is None else gmem.at[expert]

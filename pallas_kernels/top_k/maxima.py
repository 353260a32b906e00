"""Scores as integers that are ordered as they are, and the largest of every tile: by many thread blocks a row."""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.top_k.tiling import BLOCK

LEAST, LARGEST = -(2**31), 2**31 - 1
WITHOUT_BARRIERS = plgpu.CompilerParams(unsafe_no_auto_barriers=True)


def ordered(scores: jax.Array) -> jax.Array:
    """int32 keys of float32 scores, all above LEAST."""
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    key = bits ^ ((bits >> 31) & LARGEST)
    key = jnp.where(key == -1, 0, key)  # -0
    return jnp.where(scores != scores, LARGEST, key)


def maxima(scores: jax.Array, counts: jax.Array, tile: int) -> jax.Array:
    """int32 [rows, C / tile]: the largest key of each tile of which a row shows something."""
    rows, columns = scores.shape
    tiles = BLOCK // tile
    shape, lanes = (tiles, tile), tile // 4
    per_warp = 32 // lanes
    tiles_in_warps = plgpu.Tiling(((4 * per_warp, tile), (per_warp, tile), (4,)))
    layout = plgpu.Layout.TILED(tiles_in_warps, (-5,), (-3, -2), -1)

    def kernel(scores_gmem, counts_gmem, maxima_gmem):
        row, first = lax.axis_index("row"), lax.axis_index("block") * tiles
        shown = jnp.minimum(counts_gmem[row], columns) - first * tile

        @pl.when(shown > 0)
        def _maxima():
            here = pl.ds(first, tiles)
            x = plgpu.load(scores_gmem.at[row, here], layout=layout, optimized=False)
            place = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) * tile
            place = place + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
            maxima_gmem[row, here] = jnp.max(jnp.where(place < shown, ordered(x), LEAST), axis=1)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows, columns // tile), jnp.int32),
        grid=(rows, columns // BLOCK),
        grid_names=("row", "block"),
        compiler_params=WITHOUT_BARRIERS,
    )(scores.reshape(rows, columns // tile, tile), counts)

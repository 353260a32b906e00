"""Partial products and squares of mHC's `pre` in device memory, between those who make and those who sum them.

A token's are rows of 32 numbers, one for each part of the columns: 24 products, their squares, and nothing.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_matmul.kernel_sm90 import ROWS
from pallas_kernels.hyper_connection.share_sm90 import Cut, Share
from pallas_kernels.hyper_connection.tiling import GROUP, MIXED, STREAMS, TILE, UNIT, PreTiling
from pallas_kernels.mosaic.launch import store_narrow
from pallas_kernels.mosaic.words import of_float, put, wait_behind

ROW = 32  # columns of a row: 24, the squares, and as many as a warp has lanes
SQUARES = MIXED  # the column of the squares


def groups_of(width: int, units: int) -> tuple[int, int]:
    """Into how many groups the columns of streams so wide are cut, and how many parts are of each."""
    return STREAMS * width // (UNIT * GROUP), GROUP // units


class Partials(NamedTuple):
    """gmem: float32 [groups, parts of each, rows of `ring` tiles of every team, 32]; who is waited for says a handover.

    Of the rows only tokens' mean anything.
    """

    share: Share
    gmem: Any
    ring: int

    @staticmethod
    def type_of(of: Cut, width: int, tiling: PreTiling, ring: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*groups_of(width, tiling.units), of.teams * ring * TILE, ROW), jnp.float32)

    def store(self, i: jax.Array, product: jax.Array, squares: jax.Array) -> None:
        """Of the team's i-th tile: product [64, 24], squares [64]."""
        each = self.gmem.shape[1]
        at = lax.div(self.share.part, each), lax.rem(self.share.part, each), pl.ds(self.share.rows(i, self.ring), TILE)
        store_narrow(self.gmem, (*at, pl.ds(0, MIXED)), product)  # rows of 96 bytes
        store_narrow(self.gmem, (*at, SQUARES), squares)

    def load(self, i: jax.Array) -> list[jax.Array]:
        """Of the token of round i: [groups, 32] as often as there are parts of a group."""
        of_token = self.gmem.at[:, :, self.share.row(i, self.ring)]
        groups, each, _ = of_token.shape
        return [plgpu.load(of_token.at[:, c], layout=part_lanes(groups), optimized=False) for c in range(each)]


class Words(NamedTuple):
    """gmem: int32 [parts x tokens x 32 or more], 0 at the start, of float32 numbers that are there when they are not 0.

    groups: as `groups_of` gives them.
    """

    share: Share
    gmem: Any
    groups: tuple[int, int]

    @staticmethod
    def needed(of: Cut) -> int:
        return of.parts * of.tokens * ROW

    def store(self, i: jax.Array, product: jax.Array, squares: jax.Array) -> None:
        """Of the team's i-th tile, whose rows behind the last token are nobody's: product [64, 24], squares [64]."""
        tokens, first = self.share.cut.tokens, self.share.tile(i) * TILE

        def behind(shape: tuple[int, ...], layout: Any) -> jax.Array:
            token = first + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
            return jnp.where(token < tokens, (self.share.part * tokens + token) * ROW, -ROW)

        column = plgpu.broadcasted_iota(jnp.int32, product.shape, 1, layout=plgpu.Layout.WGMMA)
        index = behind(product.shape, plgpu.Layout.WGMMA) + column
        put(self.gmem, index, of_float(product), plgpu.Layout.WGMMA)
        put(self.gmem, behind(squares.shape, ROWS) + SQUARES, of_float(squares), ROWS)

    def load(self, i: jax.Array) -> list[jax.Array]:
        """As soon as they are there, of the token of round i, or where there is none of the last: [groups, 32] each."""
        tokens, (groups, each) = self.share.cut.tokens, self.groups
        layout, warps = part_lanes(groups), math.gcd(groups, 4)
        # A lane behind the squares has them, too, as nobody stores what would be its own.
        group, lane = (plgpu.broadcasted_iota(jnp.int32, (warps, ROW), axis, layout=layout) for axis in range(2))
        token = jnp.minimum(self.share.token(i), tokens - 1)
        first = (group * each * tokens + token) * ROW + jnp.minimum(lane, SQUARES)
        offsets = [[(g * each + c) * tokens * ROW for g in range(0, groups, warps)] for c in range(each)]
        found = wait_behind(self.gmem, first, offsets, (groups, ROW), layout)
        return [lax.bitcast_convert_type(words, jnp.float32) for words in found]


def part_lanes(groups: int) -> Any:
    """How a warpgroup has [groups, 32]: a lane for each column, groups over as many warps as divide them."""
    warps = math.gcd(groups, 4)
    warp_dims = {4: (-3,), 2: (plgpu.Replicated(2), -3), 1: (plgpu.Replicated(4),)}[warps]
    return plgpu.Layout.TILED(plgpu.Tiling(((warps, ROW), (1,))), warp_dims, (-2,), -1)

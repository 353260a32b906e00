"""Scales of K blocks on their way from device memory into a consumer's registers, ahead of the products they multiply.

A load that is waited for costs a consumer more than its additions. UE8M0 bytes of four K blocks lie side by side: one
word a row, loaded while the four before are multiplied, and the first of a tile before the results of the tile before
go out. Other scales, and other depths, are loaded one K block at a time.
"""

# Pallas's types cannot be followed.
# pyright: reportArgumentType=false

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.block_matmul.pipeline_sm90 import ROWS, WGMMA_ROWS
from pallas_kernels.mosaic.scale_words import BYTES, bits_of, least_bits, load_word, load_words
from pallas_kernels.mosaic.scales import LEAST_BITS, activation_bits, scale_bits, scale_product


class Found(NamedTuple):
    """Scales of 64 rows each in registers, by K block and part of the tile, and of each weight."""

    rows: list[list[jax.Array]]
    weights: list[list[jax.Array]]

    def bits(self) -> Found:
        """Of the bytes that were loaded; not before they are needed, as it waits for them."""
        rows = [[activation_bits(x) for x in block] for block in self.rows]
        return Found(rows, [[scale_bits(x) for x in block] for block in self.weights])

    def product(self, block: int, part: int, weight: int) -> jax.Array:
        """float32 [64]: what the products of a part with a weight are multiplied with."""
        return scale_product(self.rows[block][part], self.weights[block][weight])


class Words(NamedTuple):
    """Scales of four K blocks as loaded, a word a row, by part of the tile, and of each weight."""

    rows: list[jax.Array]
    weights: list[jax.Array]

    def least(self) -> list[jax.Array]:
        """Of each weight, what `bits` needs for all four blocks; it waits for the words."""
        return [least_bits(word) for word in self.weights]

    def bits(self, at: Any, count: int, least: list[jax.Array]) -> Found:
        """Of `count` K blocks from the one at `at` in their group on."""
        of_k = [at + b for b in range(count)]
        of_weights = list(zip(self.weights, least, strict=True))
        rows = [[bits_of(word, b, LEAST_BITS) for word in self.rows] for b in of_k]
        return Found(rows, [[bits_of(word, b, low) for word, low in of_weights] for b in of_k])


@dataclass(frozen=True)
class TileScales:
    """Where the scales of a consumer's part of a tile lie.

    rows_gmem [M, K/128], of which `rows` are its, 64 a part; weights_gmem: of each weight, [N/128, K/128], of which
    `block` is its. first, steps: the K blocks of this thread block.
    """

    rows_gmem: Any
    weights_gmem: list[Any]
    rows: list[Any]
    block: Any
    first: Any
    steps: int

    def blocks(self, at: Any, count: int) -> Found:
        """Of `count` K blocks from `at` on; behind the last, of the last ones."""
        at = self.first + jnp.minimum(at, self.steps - count)
        load = functools.partial(plgpu.load, layout=ROWS, optimized=False)
        of_k = [at + b for b in range(count)]
        rows = [[load(self.rows_gmem.at[rows, b]) for rows in self.rows] for b in of_k]
        return Found(rows, [[gmem[self.block, b] for gmem in self.weights_gmem] for b in of_k])

    def words(self, group: Any) -> Words:
        """Of the four K blocks of a group; behind the last, of the last one."""
        at = pl.ds(self.first + jnp.minimum(group, self.steps // BYTES - 1) * BYTES, BYTES)
        rows = [load_words(self.rows_gmem.at[rows, at], ROWS) for rows in self.rows]
        return Words(rows, [load_word(gmem.at[self.block, at], WGMMA_ROWS, ROWS) for gmem in self.weights_gmem])

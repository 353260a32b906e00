"""Who scores what: items of ITEM keys of one unit, dealt evenly to persistent thread blocks, from counts on the device.

A unit is a block of query tokens of one sequence. Its items cover the most keys that one of its tokens wants. Every
warp finds its thread block's share by itself, in registers: a prefix sum is a masked sum over lanes.
"""

# Pallas's transforms look abstract to the checker, and Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir.dialects import llvm

from pallas_kernels.index_scores.tiling import ITEM
from pallas_kernels.mosaic.interpreter import is_interpreted

LANES = 32
MOST_SPLIT = 1024  # units up to which items are dealt: a lane holds 32 counts. Beyond, whole units are.
# One count a lane and register; every warp holds them all.
_OF_UNITS = plgpu.Layout.TILED(plgpu.Tiling(((LANES,), (1,))), (plgpu.Replicated(4),), (-2,), -1)


def walk(
    counts_gmem: Any,
    entries: int,
    block: jax.Array,
    blocks: int,
    segment: Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], None],
) -> tuple[jax.Array, jax.Array]:
    """Calls segment(unit, first, items, segments, done) for each run of items of one unit that is this block's.

    counts_gmem int32 [units, tokens]: keys wanted, of `entries` there are. segments and done: how many segments, and
    items in all, came before. Returns both.
    """
    units, tokens = counts_gmem.shape

    def items_of(unit: Any) -> jax.Array:
        count = counts_gmem[unit, 0]
        for t in range(1, tokens):
            count = jnp.maximum(count, counts_gmem[unit, t])
        return _items(count, entries)

    if units > MOST_SPLIT:
        unit, first, todo, stride = block, jnp.int32(0), jnp.int32(2**30), blocks
    else:
        unit, first, todo = _share(counts_gmem, entries, items_of, block, blocks)
        stride = 1

    def go_on(state: tuple[jax.Array, ...]) -> jax.Array:
        unit, _, todo, _, _ = state
        return (unit < units) & (todo > 0)

    def step(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        unit, first, todo, segments, done = state
        items = jnp.minimum(items_of(unit) - first, todo)
        segment(unit, first, items, segments, done)
        return unit + stride, jnp.int32(0), todo - items, segments + 1, done + items

    zero = jnp.int32(0)
    *_, segments, done = lax.while_loop(go_on, step, (unit, first, todo, zero, zero))
    return segments, done


def likely_first(units: int, items: int, block: jax.Array, blocks: int) -> tuple[jax.Array, jax.Array]:
    """The unit and the item in which a block's share begins if all units want all of their `items`."""
    if units > MOST_SPLIT:
        return jnp.minimum(block, units - 1), jnp.int32(0)
    begin = jnp.minimum(_cut(jnp.int32(units * items), block, blocks), units * items - 1)
    return lax.div(begin, items), lax.rem(begin, items)


def prefetch(element_gmem: Any) -> None:
    """Asks for the line of memory that [1] of an array is in."""
    if is_interpreted():
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def run(_ctx: Any, element: Any) -> None:
        args = [utils.memref_ptr(element)]
        llvm.inline_asm(None, args, "prefetch.global.L2 [$0];", "l", has_side_effects=True)

    run(element_gmem)


def _share(
    counts_gmem: Any, entries: int, items_of: Callable[[Any], jax.Array], block: jax.Array, blocks: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The unit in which the block's share begins, the first item there, and how many items there are."""
    units, tokens = counts_gmem.shape
    if units == 1:
        total = items_of(0)
        begin, end = _cut(total, block, blocks), _cut(total, block + 1, blocks)
        return jnp.int32(0), begin, end - begin
    whole = units // LANES * LANES
    rest = [(unit, items_of(unit)) for unit in range(whole, units)]  # where a vector would reach beyond the last unit
    index = items = None
    if whole:
        each = [
            plgpu.load(counts_gmem.at[pl.ds(0, whole), t], layout=_OF_UNITS, optimized=False) for t in range(tokens)
        ]
        items = _items(functools.reduce(jnp.maximum, each), entries)
        index = plgpu.broadcasted_iota(jnp.int32, (whole,), 0, layout=_OF_UNITS)

    def before(unit: Any) -> jax.Array:
        """Items of all units below `unit`."""
        found = jnp.int32(0) if items is None else jnp.sum(jnp.where(index < unit, items, 0))
        for other, more in rest:
            found = found + jnp.where(other < unit, more, 0)
        return found

    total = before(units)
    begin, end = _cut(total, block, blocks), _cut(total, block + 1, blocks)
    bits = (units - 1).bit_length()

    def halve(i: jax.Array, unit: jax.Array) -> jax.Array:
        later = unit + (1 << (bits - 1 - i))
        return jnp.where((later < units) & (before(later) <= begin), later, unit)

    unit = lax.fori_loop(0, bits, halve, jnp.int32(0))
    return unit, begin - before(unit), end - begin


def _items(count: jax.Array, entries: int) -> jax.Array:
    return (jnp.clip(count, 0, entries) + (ITEM - 1)) >> (ITEM.bit_length() - 1)


def _cut(total: jax.Array, block: jax.Array, blocks: int) -> jax.Array:
    """Where the share of `block` begins: shares differ by one item at most, and nothing overflows."""
    each, more = lax.div(total, blocks), lax.rem(total, blocks)
    return each * block + jnp.minimum(block, more)

"""Pairs in order, where few of them are alike: by bins of keys, of which each has few pairs.

A pair's rank is the number of pairs in the bins above its own, and of those in its own bin that come before it. Pairs
are put down bin after bin, in any order within one, so that a pair is compared with its neighbours alone. A sort of 512
would take 45 steps, 10 of them across warps.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.top_k.look_up import look_up
from pallas_kernels.top_k.team import Team
from pallas_kernels.top_k.warpgroup import (
    NOWHERE,
    WARP,
    constant,
    each_scalar,
    in_lanes,
    is_set,
    scanned,
    shared_address,
    store_if,
    word,
)

DIGIT = 9
BINS = 1 << DIGIT
HELD_BINS = BINS + NOWHERE  # words; of ends, the one behind those of bins is that of the bin above the last: 0
_PER_LANE = BINS // WARP


class Binning(NamedTuple):
    """Bin (key - base) >> shift of those keys in base, base + 1, ... base + span, which is unsigned."""

    base: jax.Array
    shift: jax.Array
    span: jax.Array

    def of(self, key: jax.Array) -> jax.Array:
        return jnp.clip(lax.shift_right_logical(key - self.base, jnp.broadcast_to(self.shift, key.shape)), 0, BINS - 1)


def begin_bins(bins_smem: Any, ends_smem: Any, fullest_smem: Any) -> None:
    """For one warpgroup: ends_smem[i] = how many items are in the bins above i, for now, and 0 behind the last one.

    fullest_smem[0] = how many the fullest bin has. Every warp finds all of it, and all store the same.
    """
    if is_interpreted():
        bins = bins_smem[...][:BINS]
        ends_smem[pl.ds(0, BINS)] = jnp.cumsum(bins[::-1])[::-1] - bins
        ends_smem[BINS] = 0
        fullest_smem[0] = jnp.max(bins)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
    def run_mosaic(_ctx: Any, bins: Any, ends: Any, fullest: Any) -> None:
        lane = llvm.inline_asm(word(), [], "mov.u32 $0, %laneid;", "=r")
        first = arith.muli(lane, constant(_PER_LANE))
        four = ir.VectorType.get((4,), word())

        def address(ref: Any, at: int) -> ir.Value:
            return utils.getelementptr(utils.memref_ptr(ref), [arith.addi(first, constant(at))], word())

        own = []
        for at in range(0, _PER_LANE, 4):
            loaded = llvm.load(four, address(bins, at), alignment=16)
            own += [vector.extract(loaded, [], [i]) for i in range(4)]
        total, most = own[0], own[0]
        for other in own[1:]:
            total, most = arith.addi(total, other), arith.maxsi(most, other)
        above, begins = arith.subi(scanned(total, "down"), total), []
        for mine in reversed(own):
            begins.insert(0, above)
            above = arith.addi(above, mine)
        for at in range(0, _PER_LANE, 4):
            llvm.store(vector.from_elements(four, begins[at : at + 4]), address(ends, at), alignment=16)
        llvm.store(constant(0), utils.getelementptr(utils.memref_ptr(ends), [constant(BINS)], word()))
        everyone = "redux.sync.max.s32 $0, $1, 0xffffffff;"
        most = llvm.inline_asm(word(), [most], everyone, "=r,r", has_side_effects=True)
        llvm.store(most, utils.memref_ptr(fullest))

    run_mosaic(bins_smem, ends_smem, fullest_smem)


def put_down(team: Team, ends_smem: Any, bins: jax.Array, where: jax.Array, *stored: tuple[Any, jax.Array]) -> None:
    """Stores those values that `where`, 0 or 1, is 1 of at ends_smem[bin], which moves on by one for each."""
    refs, values = zip(*stored, strict=True)
    if is_interpreted():

        def run() -> None:
            alike = (bins[:, None] == bins[None]) & (where[None] != 0)
            before = jnp.sum(jnp.tril(alike, -1), axis=1)
            place = jnp.where(where != 0, ends_smem[...][bins] + before, refs[0].shape[0])
            for ref, value in stored:
                ref[...] = ref[...].at[place].set(value, mode="drop")
            ends_smem[...] = ends_smem[...].at[jnp.where(where != 0, bins, HELD_BINS)].add(1, mode="drop")

        team.in_turn(run)
        return
    layout = in_lanes(*bins.shape)
    kinds = (plgpu.RefType(), layout, layout, *[plgpu.RefType()] * len(refs), *[layout] * len(refs))

    @plgpu.inline_mgpu(arg_types=kinds)
    def run_mosaic(_ctx: Any, ends: Any, bins: Any, where: Any, *rest: Any) -> None:
        refs, values = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        first, bases = shared_address(ends), [shared_address(ref) for ref in refs]
        for at, bin_ in each_scalar(bins):
            address = arith.addi(first, arith.shli(bin_, constant(2)))
            ptx = "{ mov.b32 $0, 0; @$2 atom.shared.add.u32 $0, [$1], 1; }"
            wanted = is_set(where.registers[at])
            place = llvm.inline_asm(word(), [address, wanted], ptx, "=&r,r,b,~{memory}", has_side_effects=True)
            place = arith.shli(place, constant(2))
            for base, value in zip(bases, values, strict=True):
                store_if("shared", "r", where.registers[at], arith.addi(base, place), value.registers[at])

    run_mosaic(ends_smem, bins, where, *refs, *values)


def rank_of(
    ends_smem: Any, keys_smem: Any, places_smem: Any, pair: tuple[jax.Array, jax.Array], bins: jax.Array, fullest: Any
) -> jax.Array:
    """The rank of pairs int32 [n] among all that were put down: larger keys first, then lower places."""
    key, place = pair
    begin, end = look_up(ends_smem, bins + 1), look_up(ends_smem, bins)

    def compare(i: jax.Array, rank: jax.Array) -> jax.Array:
        inside = begin + i < end
        at = jnp.where(inside, begin + i, 0)
        other, other_place = look_up(keys_smem, at), look_up(places_smem, at)
        before = (other > key) | ((other == key) & (other_place < place))
        return rank + (before & inside).astype(jnp.int32)

    return lax.fori_loop(0, fullest, compare, begin)

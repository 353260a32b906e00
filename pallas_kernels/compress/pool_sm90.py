"""Rows of an entry pooled in a warpgroup's registers, a part at a time; and a launch that pools parts side by side."""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.compress import entry_sm90 as entries
from pallas_kernels.compress.tiling import Held

LOWEST = float(np.finfo(np.float32).min)


class Softmax(NamedTuple):
    """Of the rows so far, for every channel: the largest gate, and the sums of exp(gate - it) and of that times kv."""

    peak: jax.Array
    total: jax.Array
    weighted: jax.Array

    def value(self) -> jax.Array:
        return self.weighted / self.total


class Cut(NamedTuple):
    """How an entry comes of its rows; few: a step's rows are in the rings before they are read."""

    ratio: int
    halves: int
    at_once: int
    size: Held
    few: bool

    @property
    def parts(self) -> int:
        return self.halves * self.ratio // self.at_once

    @property
    def layout(self) -> Any:
        return entries.registers(self.size)

    def load(self, memory: Any) -> jax.Array:
        return plgpu.load(memory, layout=self.layout, optimized=False)

    def everywhere(self, scalar: Any) -> jax.Array:
        return plgpu.layout_cast(lax.broadcast_in_dim(jnp.asarray(scalar), self.size, ()), self.layout)

    def nothing(self) -> Softmax:
        return Softmax(*(self.everywhere(jnp.float32(x)) for x in (LOWEST, 0.0, 0.0)))


class Memory(NamedTuple):
    """Rows in device memory: kv and gate of the call and of the rings [B, .., halves, *size], and ape."""

    kv: Any
    gate: Any
    kv_ring: Any
    gate_ring: Any
    ape: Any


def pooled(cut: Cut, memory: Memory, b: Any, begin: Any, entry: Any, first_part: Any, parts: int) -> Softmax:
    """Of an entry of sequence b, whose new rows begin at a position, some parts."""

    def over_parts(all_new: bool) -> Softmax:
        def one(i: Any, softmax: Softmax) -> Softmax:
            at = (first_part + i) * cut.at_once
            return added(softmax, part(cut, memory, b, begin, entry, at, all_new))

        return one(0, cut.nothing()) if parts == 1 else lax.fori_loop(0, parts, one, cut.nothing())

    if cut.few:
        return over_parts(False)
    new = (entry - (cut.halves - 1)) * cut.ratio >= begin  # only the first entries have rows of the rings
    return lax.cond(new, lambda: over_parts(True), lambda: over_parts(False))


def part(cut: Cut, memory: Memory, b: Any, begin: Any, entry: Any, at: Any, all_new: bool) -> list[Any]:
    """kv and gates of rows at .. at + at_once - 1 of an entry, all loaded together."""
    found = []
    for i in range(cut.at_once):
        half = (at + i) // cut.ratio if isinstance(at, int) else lax.div(at, cut.ratio)
        position = (entry - (cut.halves - 1)) * cut.ratio + at + i
        values, gates = row(cut, memory, b, begin, position, half, all_new)
        gates = gates + cut.load(memory.ape.at[at + i - half * cut.ratio, half])
        if cut.halves > 1:  # the block before the first does not exist
            exists = cut.everywhere(position >= 0)
            values, gates = jnp.where(exists, values, 0.0), jnp.where(exists, gates, -jnp.inf)
        found.append((values, gates))
    return found


def row(
    cut: Cut, memory: Memory, b: Any, begin: Any, position: Any, half: Any, all_new: bool
) -> tuple[jax.Array, jax.Array]:
    """kv and gate of one row: of the rings, or of the call's rows once they have begun."""

    def kept() -> tuple[jax.Array, jax.Array]:
        slots = memory.kv_ring.shape[1]
        slot = lax.rem(position + slots, slots)  # before position 0: any row, which is not used
        return cut.load(memory.kv_ring.at[b, slot, half]), cut.load(memory.gate_ring.at[b, slot, half])

    def new() -> tuple[jax.Array, jax.Array]:
        t = jnp.clip(position - begin, 0, memory.kv.shape[1] - 1)
        return cut.load(memory.kv.at[b, t, half]), cut.load(memory.gate.at[b, t, half])

    if cut.few or all_new:
        return kept() if cut.few else new()
    before = cut.everywhere(position < begin)
    values, gates = (jnp.where(before, old, now) for old, now in zip(kept(), new(), strict=True))
    return values, gates


def added(softmax: Softmax, found: Sequence[Any]) -> Softmax:
    peak = functools.reduce(jnp.maximum, [gates for _, gates in found], softmax.peak)
    shrink = jnp.exp(softmax.peak - peak)
    total, weighted = softmax.total * shrink, softmax.weighted * shrink
    for values, gates in found:
        power = jnp.exp(gates - peak)
        total, weighted = total + power, weighted + power * values
    return Softmax(peak, total, weighted)


def merged(parts: Sequence[Softmax]) -> Softmax:
    """Of all rows of all parts."""
    peak = functools.reduce(jnp.maximum, [one.peak for one in parts])
    shrinks = [jnp.exp(one.peak - peak) for one in parts]
    total, weighted = (
        functools.reduce(jnp.add, [values * shrink for values, shrink in zip(of, shrinks, strict=True)])
        for of in ([one.total for one in parts], [one.weighted for one in parts])
    )
    return Softmax(peak, total, weighted)


def pool_parts(cut: Cut, rows: Sequence[jax.Array], start: jax.Array, count: jax.Array, blocks: int) -> jax.Array:
    """float32 [B, blocks, parts, 3, *size]: the Softmax of every part of every entry that closes, of few long ones.

    rows: what Memory has. A thread block is one warpgroup and has one part, all of whose loads are in flight at once.
    """
    batch = len(start)

    def kernel(kv, gate, kv_ring, gate_ring, ape, start_gmem, count_gmem, out_gmem):
        b, block, at = (lax.axis_index(name) for name in ("sequence", "block", "part"))
        begin = start_gmem[b]
        first = lax.div(begin, cut.ratio)

        @pl.when(block < lax.div(begin + count_gmem[b], cut.ratio) - first)
        def _pool():
            memory = Memory(kv, gate, kv_ring, gate_ring, ape)
            for i, values in enumerate(pooled(cut, memory, b, begin, first + block, at, 1)):
                out_gmem[b, block, at, i] = values

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, blocks, cut.parts, len(Softmax._fields), *cut.size), jnp.float32),
        grid=(batch, blocks, cut.parts),
        grid_names=("sequence", "block", "part"),
    )(*rows, start, count)

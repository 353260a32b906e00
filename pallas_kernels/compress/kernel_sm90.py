"""Compression into a cache on Hopper: open blocks, and every entry that closes, normed, rotated and quantised, in one
launch and in place.

For the rows r of an entry (one block; with overlap the first half of the block before and the second half of its own):

    entry = encode(rotate(rms_norm(sum_r exp(g_r - max g) c_r / sum_r exp(g_r - max g)))),   g_r = gate_r + ape_r

A step of few tokens: a thread block is one warpgroup and has one sequence. It puts the step's rows into the rings of
the open blocks, and where a block closes it reads all its rows back from there. A thread holds the same four channels
(of 512; fewer of narrow entries, which every warp holds) of every row, so that it reads what it has written itself,
sums over rows stay in its registers, and no order of anything depends on other sequences. Rows come 16 at a time, the
loads of all of them in flight at once; of longer blocks the softmax is carried on from part to part. Only the mean of
squares crosses warps, and rotary pairs and Hadamard butterflies neighbouring registers and lanes. FP8 entries go
through shared memory: their codes and their rotary tail are two arrays.

A chunk of many tokens: a thread block has one entry, whose rows come from the chunk, or from the rings for what lies
before it. The rings are XLA's then: writing them here would overwrite what other thread blocks read.

Bound: 16 T w bytes a sequence (float32 rows of w in, and out), and 8 w bytes a row of an entry that closes; in practice
the latency of launch and of two dependent loads. On an H100, whole calls, in brackets XLA's: ratio 4, one sequence
4.1 us (18.3), 128 6.8 (23.9), a chunk of 2048 tokens 19.7 (34.9). Ratio 128, one 12.7 (21.0), 128 29.7 (106, the bound
is 20.3), the chunk 28.3 (23.7): an entry's rows are one warpgroup's work, and 16 entries do not fill the GPU.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.compress import entry_sm90 as entries
from pallas_kernels.compress.reference import CompressorState
from pallas_kernels.compress.tiling import held
from pallas_kernels.compress.tiling import split as split_rows
from pallas_kernels.quant.rows import Rows
from pallas_kernels.ring import MAX_STEP, write_ring

LOWEST = float(np.finfo(np.float32).min)


class Softmax(NamedTuple):
    """Of the rows so far, for every channel: the largest gate, and the sums of exp(gate - it) and of that times kv."""

    peak: jax.Array
    total: jax.Array
    weighted: jax.Array


def compress_into(
    rows: Rows,
    kv: jax.Array,
    gate: jax.Array,
    state: CompressorState,
    start: jax.Array,
    count: jax.Array,
    ape: jax.Array,
    norm_weight: jax.Array,
    frequencies: jax.Array,
    *,
    norm_eps: float,
) -> tuple[Rows, CompressorState]:
    """`reference.compress_into`; tiling.py has the limits."""
    (batch, tokens, _), (ratio, _), width = kv.shape, ape.shape, norm_weight.shape[0]
    halves, size, form = ape.shape[1] // width, held(width), rows.format
    slots, few = state.kv.shape[1], tokens <= MAX_STEP
    blocks = (tokens + ratio - 1) // ratio  # the most that can close
    layout = entries.registers(size)
    warpgroups, parts, at_once = split_rows(ratio, halves)

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], -1, *size)

    def kernel(kv_gmem, gate_gmem, start_gmem, count_gmem, ape_gmem, weight_gmem, turn_gmem, *refs, **scratch):
        kv_ring, gate_ring, *out_gmem = refs
        b, warpgroup = lax.axis_index("sequence"), lax.axis_index("warpgroup") if warpgroups > 1 else 0
        of_entry = {name: ref for name, ref in scratch.items() if name in entries.scratch(form, size)}
        begin, added = start_gmem[b], count_gmem[b]
        first = lax.div(begin, ratio)
        closed = lax.div(begin + added, ratio) - first

        def load(gmem: Any) -> jax.Array:
            return plgpu.load(gmem, layout=layout, optimized=False)

        def everywhere(scalar: Any) -> jax.Array:
            return plgpu.layout_cast(lax.broadcast_in_dim(jnp.asarray(scalar), size, ()), layout)

        def keep() -> None:
            """The step's rows into the rings."""
            to = [(t, half, pair) for t in range(tokens) for half in range(halves) for pair in (0, 1)]
            new = [load((kv_gmem, gate_gmem)[pair].at[b, t, half]) for t, half, pair in to]
            for t in range(tokens):

                @pl.when(t < added)
                def _row(t=t):
                    slot = lax.rem(begin + t, slots)
                    for (token, half, pair), values in zip(to, new, strict=True):
                        if token == t:
                            (kv_ring, gate_ring)[pair][b, slot, half] = values

        def row(position: Any, half: Any, all_new: bool) -> tuple[jax.Array, jax.Array]:
            """kv and gate of one row: of the rings, or of the chunk where it has begun."""

            def kept() -> tuple[jax.Array, jax.Array]:
                slot = lax.rem(position + slots, slots)  # before position 0: any row, which is not used
                return load(kv_ring.at[b, slot, half]), load(gate_ring.at[b, slot, half])

            def new() -> tuple[jax.Array, jax.Array]:
                t = jnp.clip(position - begin, 0, tokens - 1)
                return load(kv_gmem.at[b, t, half]), load(gate_gmem.at[b, t, half])

            if few:
                return kept()
            if all_new:
                return new()
            before = everywhere(position < begin)
            values, gates = (jnp.where(before, old, now) for old, now in zip(kept(), new(), strict=True))
            return values, gates

        def part(at: Any, entry: jax.Array, softmax: Softmax, all_new: bool) -> Softmax:
            """Rows at .. at + at_once - 1 of an entry, added."""
            found = []
            for i in range(at_once):
                half = (at + i) // ratio if isinstance(at, int) else lax.div(at, ratio)
                position = (entry - (halves - 1)) * ratio + at + i
                values, gates = row(position, half, all_new)
                gates = gates + load(ape_gmem.at[at + i - half * ratio, half])
                if halves > 1:  # the block before the first does not exist
                    exists = everywhere(position >= 0)
                    values, gates = jnp.where(exists, values, 0.0), jnp.where(exists, gates, -jnp.inf)
                found.append((values, gates))
            peak = functools.reduce(jnp.maximum, [gates for _, gates in found], softmax.peak)
            shrink = jnp.exp(softmax.peak - peak)
            total, weighted = softmax.total * shrink, softmax.weighted * shrink
            for values, gates in found:
                power = jnp.exp(gates - peak)
                total, weighted = total + power, weighted + power * values
            return Softmax(peak, total, weighted)

        def pooled(entry: jax.Array) -> jax.Array:
            """Of an entry: the rows of this warpgroup, and then of all."""
            softmax = Softmax(*(everywhere(jnp.float32(x)) for x in (LOWEST, 0.0, 0.0)))
            first_row = 0 if warpgroups == 1 else warpgroup * (parts * at_once)

            def rows_of(all_new: bool) -> Softmax:
                if warpgroups * parts == 1:
                    return part(0, entry, softmax, all_new)
                one = lambda i, so_far: part(first_row + i * at_once, entry, so_far, all_new)  # noqa: E731
                return lax.fori_loop(0, parts, one, softmax)

            if few:
                softmax = rows_of(False)
            else:  # only the first entries have rows of the rings
                new = (entry - (halves - 1)) * ratio >= begin
                softmax = lax.cond(new, lambda: rows_of(True), lambda: rows_of(False))
            if warpgroups > 1:
                softmax = over_warpgroups(softmax)
            return softmax.weighted / softmax.total

        def over_warpgroups(softmax: Softmax) -> Softmax:
            """Of all rows, in every warpgroup and to the same bits."""
            shared, meet = scratch["shared"], scratch["meet"]
            for at, values in enumerate(softmax):
                shared[warpgroup, at] = values
            together(meet)
            each = [Softmax(*(load(shared.at[w, at]) for at in range(3))) for w in range(warpgroups)]
            peak = functools.reduce(jnp.maximum, [one.peak for one in each])
            shrinks = [jnp.exp(one.peak - peak) for one in each]
            total, weighted = (
                functools.reduce(jnp.add, [one[at] * shrink for one, shrink in zip(each, shrinks, strict=True)])
                for at in (1, 2)
            )
            return Softmax(peak, total, weighted)

        def together(meet: Any) -> None:
            plgpu.barrier_arrive(meet)
            plgpu.barrier_wait(meet)

        def close(entry: jax.Array) -> None:
            wide = pooled(entry)
            if warpgroups == 1:
                finish(entry, wide)
            else:
                pl.when(warpgroup == 0)(lambda: finish(entry, wide))

        def finish(entry: jax.Array, wide: jax.Array) -> None:
            normed = entries.normed(wide, load(weight_gmem).astype(jnp.float32), norm_eps, layout)
            turned = entries.rotated(normed, entry * ratio, load(turn_gmem), layout)
            entries.write(turned, form, (b, entry), out_gmem, layout, **of_entry)

        if few and warpgroups == 1:
            keep()
        elif few:
            pl.when(warpgroup == 0)(keep)
            pl.when(closed > 0)(lambda: together(scratch["meet"]))
        for i in range(blocks) if few else [lax.axis_index("block")]:
            held_there = first + i < rows.shape[1]
            pl.when((i < closed) & held_there)(lambda i=i: close(first + i))

    # Of a channel, its frequency; 0 for those that are not rotated.
    turn = jnp.pad(jnp.repeat(frequencies.astype(jnp.float32), 2), (width - 2 * frequencies.shape[0], 0))
    rings = [split(x) for x in state]
    if few:
        rings = [jax.new_ref(x) for x in rings]
    outs = [None if x is None else jax.new_ref(x) for x in entries.views(rows, size)]
    sharing: dict[str, Any] = {}
    threads: dict[str, Any] = {}
    if warpgroups > 1:
        sharing["shared"] = plgpu.SMEM((warpgroups, len(Softmax._fields), *size), jnp.float32)
        sharing["meet"] = plgpu.Barrier(num_arrivals=warpgroups)
        threads = {"num_threads": warpgroups, "thread_name": "warpgroup"}
    plgpu.kernel(
        kernel,
        out_type=(),
        scratch_types=entries.scratch(form, size) | sharing,
        **threads,
        grid=(batch,) if few else (batch, blocks),
        grid_names=("sequence",) if few else ("sequence", "block"),
    )(split(kv), split(gate), start, count, split(ape), norm_weight.reshape(size), turn.reshape(size), *rings, *outs)
    written = [None if x is None else jax.freeze(x) for x in outs]
    leaves = (
        None if x is None else x.reshape(old.shape)
        for x, old in zip(written, (rows.body, rows.tail, rows.scale), strict=True)
    )
    if few:
        after = [jax.freeze(x).reshape(old.shape) for x, old in zip(rings, state, strict=True)]
    else:
        after = [write_ring(ring, new, start, count) for ring, new in zip(state, (kv, gate), strict=True)]
    return Rows(*leaves, rows.format), CompressorState(*after)

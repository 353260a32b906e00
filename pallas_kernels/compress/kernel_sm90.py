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
before it. Long entries are few, so that one would wait for memory again and again while most of the GPU is idle: their
parts are pooled by thread blocks of their own, in a launch before. The rings are XLA's then: writing them here would
overwrite what other thread blocks read.

Bound: 16 T w bytes a sequence (float32 rows of w in, and out), and 8 w bytes a row of an entry that closes; in practice
the latency of launch and of two dependent loads. On an H200, in brackets XLA's: ratio 4, one sequence 3.6 us (18.0),
128 6.1 (22.9), a chunk of 2048 tokens 13.1 (28.5); ratio 128, the chunk 11.7 (20.2). Of the limit 0, 20, 27 and 16 %.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compress import entry_sm90 as entries
from pallas_kernels.compress.pool_sm90 import Cut, Memory, Softmax, merged, pool_parts, pooled
from pallas_kernels.compress.reference import CompressorState
from pallas_kernels.compress.tiling import held, rows_at_once
from pallas_kernels.quant.rows import Rows
from pallas_kernels.ring import MAX_STEP, write_ring


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
    cut = Cut(ratio, halves, rows_at_once(ratio, halves), size, few)
    layout, load = cut.layout, cut.load

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], -1, *size)

    def kernel(
        kv_gmem, gate_gmem, start_gmem, count_gmem, ape_gmem, weight_gmem, turn_gmem, parts_gmem, *refs, **scratch
    ):
        kv_ring, gate_ring, *out_gmem = refs
        memory = Memory(kv_gmem, gate_gmem, kv_ring, gate_ring, ape_gmem)
        b = lax.axis_index("sequence")
        begin, added = start_gmem[b], count_gmem[b]
        first = lax.div(begin, ratio)
        closed = lax.div(begin + added, ratio) - first

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

        def of_rows(entry: jax.Array, block: Any) -> Softmax:
            if parts_gmem is None:
                return pooled(cut, memory, b, begin, entry, 0, cut.parts)
            each = range(len(Softmax._fields))
            return merged([Softmax(*(load(parts_gmem.at[b, block, p, i]) for i in each)) for p in range(cut.parts)])

        def close(entry: jax.Array, block: Any) -> None:
            wide = of_rows(entry, block).value()
            normed = entries.normed(wide, load(weight_gmem).astype(jnp.float32), norm_eps, layout)
            turned = entries.rotated(normed, entry * ratio, load(turn_gmem), layout)
            entries.write(turned, form, (b, entry), out_gmem, layout, **scratch)

        if few:
            keep()
        for i in range(blocks) if few else [lax.axis_index("block")]:
            held_there = first + i < rows.shape[1]
            pl.when((i < closed) & held_there)(lambda i=i: close(first + i, i))

    # Of a channel, its frequency; 0 for those that are not rotated.
    turn = jnp.pad(jnp.repeat(frequencies.astype(jnp.float32), 2), (width - 2 * frequencies.shape[0], 0))
    made, rings, parts = [split(x) for x in (kv, gate)], [split(x) for x in state], None
    if few:
        rings = [jax.new_ref(x) for x in rings]
    elif cut.parts > 1:
        parts = pool_parts(cut, [*made, *rings, split(ape)], start, count, blocks)
    outs = [None if x is None else jax.new_ref(x) for x in entries.views(rows, size)]
    plgpu.kernel(
        kernel,
        out_type=(),
        scratch_types=entries.scratch(form, size),
        grid=(batch,) if few else (batch, blocks),
        grid_names=("sequence",) if few else ("sequence", "block"),
    )(*made, start, count, split(ape), norm_weight.reshape(size), turn.reshape(size), parts, *rings, *outs)
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

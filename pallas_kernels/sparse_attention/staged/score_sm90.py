"""Weights of a query's entries, one warpgroup's turns: blocks of 64 FP8 entries copied, made float16, logits, exp2."""

# Pallas' transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.sparse_attention.held_sm90 import TILE, Words
from pallas_kernels.sparse_attention.many import columns_sm90 as columns
from pallas_kernels.sparse_attention.many import convert_sm90 as convert
from pallas_kernels.sparse_attention.many.entries_sm90 import BLOCK, Layout, Named, Source, place
from pallas_kernels.sparse_attention.many.score_sm90 import SCORERS, Scratch, of_rows, weigh
from pallas_kernels.sparse_attention.staged import stage_sm90 as stage
from pallas_kernels.sparse_attention.staged.place_sm90 import TAIL_TILE, TILES

STAGES = 4  # blocks in shared memory: one that is added, two that are scored, one on its way
ASKED_BEHIND = 2  # tiles of a block, by when the scorer's last one is usually added


def score(named: Named, scratch: Scratch, me: jax.Array, before: jax.Array, observed: jax.Array) -> jax.Array:
    """Makes weights of every other block of `named` for the adders; their sums are left in shared memory.

    before: how many blocks there have been; even and odd ones, counted since the beginning, are either scorer's.
    observed: of how many blocks this scorer knows that they are added; returns of how many it knows now.
    """
    slots_smem, sums_smem = scratch["slots"].at[me], scratch["sums"].at[me]
    mine = lax.rem(me + before, 2)  # the first block of the query that is this scorer's
    turns = lax.div(named.blocks - mine + (SCORERS - 1), SCORERS)
    numbers = [named.names(mine + turn * SCORERS) for turn in range(2)]
    slots_smem[0] = named.find(mine, numbers[0])
    plgpu.commit_smem()

    def fetch(i: jax.Array, now: jax.Array | int, observed: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """Starts copies of block i, once the block STAGES before it is added and its stage free; returns its scales."""
        exists, number = i < named.blocks, before + i
        observed = observe(scratch, observed, jnp.where(exists, number - (STAGES - 1), observed))

        def ask(layout: Layout, source: Source, *_: Any) -> tuple[jax.Array, ...]:
            at = place(layout, named.sequence, of_rows(slots_smem.at[now]))
            stage_smem = scratch["stages"].at[lax.rem(number, STAGES)]
            pl.when(exists)(lambda: stage.copy(source.arrays, layout.parts, at, stage_smem))
            return stage.scales(source.arrays, layout.parts, at)

        return named.of_block(i, ask), observed

    scale, observed = fetch(mine, 0, observed)

    def step(turn: jax.Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
        """Block `turn` of this scorer; numbers: those of the block after it."""
        numbers, scale, observed = state
        i, now = mine + turn * SCORERS, lax.rem(turn, 2)
        with jax.named_scope("look up"):
            slots_smem[1 - now] = named.find(i + SCORERS, numbers)
        with jax.named_scope("wait for entries"):
            stage.wait()
            plgpu.commit_smem()
        with jax.named_scope("wait for q"):  # and until the last query's sums have been read
            pl.when(turn == 0)(lambda: plgpu.barrier_wait(scratch["prepared"]))

        def ask() -> tuple[tuple[jax.Array, ...], jax.Array]:
            with jax.named_scope("ask"):
                return fetch(i + SCORERS, 1 - now, observed)

        with jax.named_scope("multiply"):
            at = lax.rem(before + i, STAGES)
            power_of, logits, (scale, observed) = multiply(scratch, me, at, scale, jnp.minimum(i, 0), ask)
        with jax.named_scope("wait for the adders"):  # who have read the last weights
            observed = observe(scratch, observed, before + i)
        with jax.named_scope("weigh all"):
            weigh(named, scratch, me, i, of_rows(slots_smem.at[now]), power_of, logits)
        return named.names(i + 2 * SCORERS), scale, observed

    _, _, observed = lax.fori_loop(0, turns, step, (numbers[1], scale, observed))

    @pl.when(turns == 0)
    def _none():
        plgpu.barrier_wait(scratch["prepared"])
        sums_smem[...] = plgpu.layout_cast(jnp.zeros(sums_smem.shape, jnp.float32), columns.OF_WARPS)

    return observed


def observe(scratch: Scratch, observed: jax.Array, blocks: jax.Array) -> jax.Array:
    """Waits until `blocks` blocks are added, if `observed` are not as many. Every phase of a barrier is waited for."""

    @pl.loop(observed, jnp.maximum(observed, blocks))
    def _wait(j):
        plgpu.barrier_wait(scratch["added"].at[lax.rem(j, STAGES)])

    return jnp.maximum(observed, blocks)


def multiply(
    scratch: Scratch,
    me: jax.Array,
    at: jax.Array,
    scale: tuple[jax.Array, ...],
    zero: jax.Array,
    meanwhile: Callable[[], Any],
) -> tuple[jax.Array, jax.Array, Any]:
    """Powers of two of a block's entries, int32 [BLOCK], and their products with q, [BLOCK, HEADS].

    The factors of codes are left for the adders, and float16 in place of bfloat16 channels. meanwhile: called behind
    the first tiles; its result is the third one.
    """
    stage_smem, factors_smem = scratch["stages"].at[at], scratch["factors"].at[at]
    words = Words((), (stage.tail(stage_smem),), scale)
    power_of = convert.exponent(words.scale, TILES, words.tails[0])
    # Zero, as the compiler cannot know: it would keep all scales in registers from here on, each by itself.
    scale = tuple(x + zero for x in scale)

    def products(accumulator: Any) -> tuple[jax.Array, Any]:
        values, found = convert.of_channels(words.tails[0], power_of), None
        stage.put_tail(stage_smem, values)
        add_logits(accumulator, scratch, me, TAIL_TILE, values, False, zero)
        for tile in range(TILES):
            if tile == ASKED_BEHIND:
                found = meanwhile()
            factor = convert.factor(scale, tile, power_of)
            factors_smem[tile] = factor
            values = convert.times_factor(stage.codes(stage_smem, tile), factor)
            add_logits(accumulator, scratch, me, tile, values, True, zero)
        return accumulator[...], found

    if is_interpreted():
        shape = BLOCK, columns.COLUMNS
        scratch["logits"][me] = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), columns.ACCUMULATOR)
        return power_of, *products(scratch["logits"].at[me])
    return power_of, *pl.run_scoped(products, plgpu.ACC((BLOCK, columns.COLUMNS), jnp.float32))


def add_logits(
    accumulator: Any, scratch: Scratch, me: jax.Array, tile: int, values: jax.Array, of_codes: bool, zero: jax.Array
) -> None:
    """accumulator += values @ q of a tile."""
    q_smem = scratch["q"]
    at, column = divmod(tile * TILE, q_smem.shape[-1])
    for i, operand in enumerate(convert.operands(values, of_codes)):
        # Where `zero` is not known to be zero, addresses are not kept in registers for all blocks.
        second = q_smem.at[zero + at, :, pl.ds(column + i * convert.HALF, convert.HALF)]
        if is_interpreted():  # its wgmma reads memory only
            accumulator[...] += jnp.dot(operand, second[...].T, preferred_element_type=jnp.float32)
        else:
            plgpu.wgmma(accumulator, operand, second.T)
            plgpu.wgmma_wait(0)

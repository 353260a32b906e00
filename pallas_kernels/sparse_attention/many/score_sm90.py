"""Weights of a query's entries, one warpgroup's turns: blocks of 64 entries to float16, their logits, exp2."""

# Pallas' transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import operand_store
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.sparse_attention.held_sm90 import TILE, Loads, Words
from pallas_kernels.sparse_attention.many import columns_sm90 as columns
from pallas_kernels.sparse_attention.many import convert_sm90 as convert
from pallas_kernels.sparse_attention.many import gather_sm90 as gather
from pallas_kernels.sparse_attention.many.entries_sm90 import BLOCK, Named

SCORERS = 2  # and buffers: a scorer puts blocks into its own
DEPTH = 2  # tiles of words that are on their way to registers
USUAL = 7  # log2 of what the reference's logit weighs
SLACK = 8  # log2 of how far a logit may exceed the reference: weights stay within 2^15
LOWEST = -3e38  # the reference of no logits
PER_HEAD = columns.ACCUMULATOR.reduce(0)
Scratch = Mapping[str, Any]


def score(named: Named, scratch: Scratch, me: jax.Array) -> None:
    """Makes weights of blocks me, me + SCORERS, ... of `named` for the adders; their sums are left in shared memory."""
    slots_smem, sums_smem = scratch["slots"].at[me], scratch["sums"].at[me]
    numbers = [named.names(me + turn * SCORERS) for turn in range(2)]
    slots_smem[0] = named.find(me, numbers[0])

    def step(turn: jax.Array, numbers: jax.Array) -> jax.Array:
        """Block `turn` of this scorer; numbers: those of the block after it."""
        i, now = turn * SCORERS + me, lax.rem(turn, 2)
        with jax.named_scope("look up"):
            load = named.loads(i, of_rows(slots_smem.at[now]))
            first = begin(load)
            slots_smem[1 - now] = named.find(i + SCORERS, numbers)
        with jax.named_scope("wait for q"):  # and until the last query's sums have been read
            pl.when(turn == 0)(lambda: plgpu.barrier_wait(scratch["prepared"]))
        power_of, logits = multiply(load, first, scratch, me, jnp.minimum(i, 0))
        weigh(named, scratch, me, i, of_rows(slots_smem.at[now]), power_of, logits)
        return named.names(i + 2 * SCORERS)

    turns = lax.div(named.blocks - me + (SCORERS - 1), SCORERS)
    lax.fori_loop(0, turns, step, numbers[1])

    @pl.when(turns == 0)
    def _none():
        plgpu.barrier_wait(scratch["prepared"])
        sums_smem[...] = plgpu.layout_cast(jnp.zeros(sums_smem.shape, jnp.float32), columns.OF_WARPS)


def begin(load: Loads) -> Words:
    """The first words of a block: registers have room for so many while the buffer is not free yet.

    Rows without codes are passed once before for their power of two, see `multiply`.
    """
    codes = load.codes[:DEPTH]
    return Words(loaded(codes), loaded(load.tails if codes else load.tails[:DEPTH]), loaded(load.scale))


def loaded(functions: Sequence[Callable[[], tuple[jax.Array, ...]]]) -> tuple[jax.Array, ...]:
    return sum((function() for function in functions), ())


def multiply(
    load: Loads, first: Words, scratch: Scratch, me: jax.Array, zero: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Powers of two of a block's entries, int32 [BLOCK], and their products with q, [BLOCK, HEADS].

    The entries are left in this scorer's buffer, as float16.
    """
    tiles = len(load.codes)
    functions = load.codes or load.tails
    if tiles:
        power_of = convert.exponent(first.scale, tiles, first.tails[0])
        # Zero, as the compiler cannot know: it would keep all scales in registers from here on, each by itself.
        first = first._replace(scale=tuple(x + zero for x in first.scale))
        held = first.codes
    else:
        power_of, held = largest(functions, first.tails)
    with jax.named_scope("wait for the buffer"):
        plgpu.barrier_wait(scratch["free"].at[me])

    def products(accumulator: Any) -> jax.Array:
        words = list(held)
        if tiles:
            values = convert.of_channels(first.tails[0], power_of)
            issue(accumulator, scratch, me, tiles, values, False, zero)
        for tile in range(len(functions)):
            now = words.pop(0)
            with jax.named_scope("convert"):
                values = (
                    convert.of_codes(now, first.scale, tile, power_of) if tiles else convert.of_channels(now, power_of)
                )
            if tile + DEPTH < len(functions):
                words += functions[tile + DEPTH]()
            with jax.named_scope("score"):
                issue(accumulator, scratch, me, tile, values, tile < tiles, zero)
        return accumulator[...]

    return power_of, pl.run_scoped(products, plgpu.ACC((BLOCK, columns.COLUMNS), jnp.float32))


def largest(
    functions: Sequence[Callable[[], tuple[jax.Array, ...]]], first: tuple[jax.Array, ...]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Powers of two of rows without codes, which are more than registers hold; and their first words, again."""
    held, power_of = list(first), jnp.full_like(convert.of_tail(first[0]), convert.LEAST)
    for i in range(len(functions)):
        power_of = jnp.maximum(power_of, convert.of_tail(held.pop(0)))
        held += functions[(i + len(first)) % len(functions)]()
    return power_of, tuple(held)


def issue(
    accumulator: Any, scratch: Scratch, me: jax.Array, tile: int, values: jax.Array, of_codes: bool, zero: jax.Array
) -> None:
    """accumulator += values @ q of a tile; values are left in the buffer."""
    q_smem, entries_smem = scratch["q"], scratch["entries"]
    at, column = divmod(tile * TILE, entries_smem.shape[-1])
    tile_smem = entries_smem.at[me, at, :, pl.ds(column, TILE)]
    for i, operand in enumerate(convert.operands(values, of_codes)):
        begin = i * convert.HALF
        # Where `zero` is not known to be zero, addresses are not kept in registers for all blocks.
        second = q_smem.at[zero + at, :, pl.ds(column + begin, convert.HALF)].T
        operand_store.store(tile_smem, operand, begin)
        if is_interpreted():  # its wgmma reads memory only
            plgpu.commit_smem()
            plgpu.wgmma(accumulator, tile_smem.at[:, pl.ds(begin, convert.HALF)], second)
        else:
            plgpu.wgmma(accumulator, operand, second)
            plgpu.wgmma_wait(0)  # waiting one later, with two operands in registers, is not faster


def weigh(
    named: Named,
    scratch: Scratch,
    me: jax.Array,
    i: jax.Array,
    slots: jax.Array,
    power_of: jax.Array,
    logits: jax.Array,
) -> None:
    """Hands the weights of block i over, and adds them to the sums."""
    other, sums_smem = 1 - me, scratch["sums"].at[me]

    def along(x: jax.Array) -> jax.Array:
        """x of each entry, for all heads."""
        return lax.broadcast_in_dim(x, logits.shape, [0])

    def across(x: jax.Array) -> jax.Array:
        """x of each head, for all entries."""
        return lax.broadcast_in_dim(x, logits.shape, [1])

    logits = logits * across(of_heads(scratch["measure"]))
    # Relative to the entries' own powers of two, as the entries are.
    log = jnp.where(slots == -1, -jnp.inf, (power_of - 127).astype(jnp.float32))
    logits = logits * along(convert.power(power_of)) + along(log)

    with jax.named_scope("wait for the reference"):
        pl.when(i > 0)(lambda: plgpu.barrier_wait(scratch["topped"].at[other]))
    before = jnp.where(i > 0, of_heads(scratch["top"]), LOWEST)
    stale = (i > 0) & (scratch["raised"][other] != 0)
    pl.when(stale)(lambda: fade(sums_smem, scratch["fade"].at[other]))
    raised = (i == 0) | columns.any_above(logits, before + SLACK)
    top = lax.cond(raised, lambda x: raise_top(scratch, me, logits, x), lambda x: x, before)
    scratch["raised"][me] = raised.astype(jnp.int32)
    pl.when(i + 1 < named.blocks)(lambda: plgpu.barrier_arrive(scratch["topped"].at[me]))

    with jax.named_scope("weigh"):
        weights = jnp.exp2(logits - across(top - USUAL))
        buffers = scratch["weights"]
        buffers[lax.rem(me, buffers.shape[0])] = weights.astype(jnp.float16)
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch["scored"].at[me])
    with jax.named_scope("sum"):
        before = jnp.where(i < SCORERS, 0.0, of_sums(sums_smem))
        sums_smem[...] = before + columns.sums_of_warps(weights * along(convert.power(2 * 127 - power_of)))


def raise_top(scratch: Scratch, me: jax.Array, logits: jax.Array, before: jax.Array) -> jax.Array:
    """Raises the reference to the block's own maxima; returns it, the sums are relative to it."""
    # Scorers raise it one behind the other, and may share a buffer.
    maxima_smem, fade_smem = scratch["maxima"].at[lax.rem(me, scratch["maxima"].shape[0])], scratch["fade"].at[me]
    maxima_smem[...] = columns.maxima_of_warps(logits)
    plgpu.commit_smem()
    top = before
    for warp in range(columns.WARPS):
        top = jnp.maximum(top, of_heads(maxima_smem.at[warp]))
    scratch["top"][...] = top
    fade_smem[...] = jnp.exp2(before - top)
    plgpu.commit_smem()
    fade(scratch["sums"].at[me], fade_smem)
    return top


def fade(sums_smem: Any, fade_smem: Any) -> None:
    by = plgpu.load(fade_smem, layout=columns.OF_WARPS.reduce(0), optimized=False)
    by = plgpu.layout_cast(lax.broadcast_in_dim(by, sums_smem.shape, [1]), columns.OF_WARPS)
    sums_smem[...] = of_sums(sums_smem) * by


def of_sums(ref: Any) -> jax.Array:
    return plgpu.load(ref, layout=columns.OF_WARPS, optimized=False)


def of_heads(ref: Any) -> jax.Array:
    return plgpu.load(ref, layout=PER_HEAD, optimized=False)


def of_rows(ref: Any) -> jax.Array:
    return plgpu.load(ref, layout=gather.EACH_ROW, optimized=False)

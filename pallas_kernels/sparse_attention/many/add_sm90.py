"""What happens to the blocks of a query that are scored: weights times entries, an adder half of the channels."""

# Pallas' transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.sparse_attention.many import columns_sm90 as columns
from pallas_kernels.sparse_attention.many import convert_sm90 as convert
from pallas_kernels.sparse_attention.many.entries_sm90 import Named
from pallas_kernels.sparse_attention.many.score_sm90 import SCORERS, Scratch
from pallas_kernels.sparse_attention.products_sm90 import add_products
from pallas_kernels.sparse_attention.units_sm90 import HEADS, Unit
from pallas_kernels.sparse_attention.words_sm90 import LOG2_E

ADDERS = 2
AHEAD = 2  # blocks that are on their way to the L2 cache
COLUMNS = 128  # of an accumulator: one instruction may not name more registers than a thread has at launch
PER_HEAD = columns.ACCUMULATOR.reduce(1)  # a vector with one element a row of an accumulator


def prepare(unit: Unit, named: Named, q_gmem: Any, scratch: Scratch, me: jax.Array, scale: float) -> None:
    """q to shared memory, this adder half of the channels, and to float16, half of the heads."""
    q_smem = scratch["q"]
    half = q_smem.shape[-1]
    plgpu.copy_gmem_to_smem(q_gmem.at[unit.query, unit.heads, pl.ds(me * half, half)], q_smem.at[me], scratch["asked"])
    for i in range(0, AHEAD, ADDERS):
        named.ask(me + i)
    with jax.named_scope("load q"):
        plgpu.barrier_wait(scratch["asked"])
    with jax.named_scope("convert q"):
        rows = pl.ds(me * convert.Q_ROWS, convert.Q_ROWS)
        convert.convert_q(q_smem, scratch["measure"], rows, scale * LOG2_E, named.parts.tiles)
        plgpu.commit_smem()
    plgpu.barrier_arrive(scratch["prepared"])


def add(named: Named, scratch: Scratch, me: jax.Array) -> list[jax.Array]:
    """The weighted sums of all blocks of entries, [HEADS, half of the channels] in pieces of COLUMNS.

    Who has to wait for weights anyway asks for blocks to come, every other one.
    """
    half = scratch["entries"].shape[-1]
    each = math.gcd(half, COLUMNS)

    def step(i: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
        slot = lax.rem(i, SCORERS)
        with jax.named_scope("ask"):
            pl.when(lax.rem(i, ADDERS) == me)(lambda: named.ask(i + AHEAD))
        with jax.named_scope("wait for weights"):
            plgpu.barrier_wait(scratch["scored"].at[slot])
        sums = lax.cond(scratch["raised"][slot] != 0, lambda x: faded(x, scratch["fade"].at[slot]), lambda x: x, sums)
        with jax.named_scope("add"):
            sums = add_products(sums, scratch["weights"].at[slot].T, scratch["entries"].at[slot, me])
        plgpu.barrier_arrive(scratch["free"].at[slot])
        return sums

    zeros = plgpu.layout_cast(jnp.zeros((HEADS, each), jnp.float32), columns.ACCUMULATOR)
    return lax.fori_loop(0, named.blocks, step, [zeros] * (half // each))


def faded(sums: list[jax.Array], fade_smem: Any) -> list[jax.Array]:
    return scaled(sums, of_heads(fade_smem))


def scaled(sums: list[jax.Array], factor: jax.Array) -> list[jax.Array]:
    return [x * lax.broadcast_in_dim(factor, x.shape, [0]) for x in sums]


def of_heads(ref: Any) -> jax.Array:
    return plgpu.load(ref, layout=PER_HEAD, optimized=False)

"""What happens to the blocks of a query that are scored: entries, turned round, times weights, on Hopper.

    out[c, h] = sum_n k[n, c] w[n, h]

An adder has half of the channels as rows of its accumulators. Its first operands are made in registers, of FP8 entries
in shared memory, so that float16 entries lie nowhere.
"""

# Pallas' transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.sparse_attention.many import columns_sm90 as columns
from pallas_kernels.sparse_attention.many import convert_sm90 as convert
from pallas_kernels.sparse_attention.many.add_sm90 import LOG2_E
from pallas_kernels.sparse_attention.many.entries_sm90 import BLOCK, Named
from pallas_kernels.sparse_attention.many.score_sm90 import SCORERS, Scratch, of_heads
from pallas_kernels.sparse_attention.staged.operands_sm90 import OPERANDS, STEP, operands
from pallas_kernels.sparse_attention.staged.place_sm90 import TILES
from pallas_kernels.sparse_attention.staged.score_sm90 import STAGES
from pallas_kernels.sparse_attention.units_sm90 import HEADS, Unit


def prepare(unit: Unit, q_gmem, scratch: Scratch, me: jax.Array, scale: float) -> None:
    """q to shared memory, this adder half of the channels, and to float16, half of the heads."""
    q_smem = scratch["q"]
    half = q_smem.shape[-1]
    plgpu.copy_gmem_to_smem(q_gmem.at[unit.query, unit.heads, pl.ds(me * half, half)], q_smem.at[me], scratch["asked"])
    with jax.named_scope("load q"):
        plgpu.barrier_wait(scratch["asked"])
    with jax.named_scope("convert q"):
        rows = pl.ds(me * convert.Q_ROWS, convert.Q_ROWS)
        convert.convert_q(q_smem, scratch["measure"], rows, scale * LOG2_E, TILES)
        plgpu.commit_smem()
    plgpu.barrier_arrive(scratch["prepared"])


def add(named: Named, scratch: Scratch, me: jax.Array, before: jax.Array) -> list[jax.Array]:
    """The weighted sums of all blocks of entries: float32 [64, HEADS] for each of OPERANDS.

    before: how many blocks there have been.
    """

    def step(i: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
        number = before + i
        slot, at = lax.rem(number, SCORERS), lax.rem(number, STAGES)
        with jax.named_scope("wait for weights"):
            plgpu.barrier_wait(scratch["scored"].at[slot])
        sums = lax.cond(scratch["raised"][slot] != 0, lambda x: faded(x, scratch["fade"].at[slot]), lambda x: x, sums)
        with jax.named_scope("add"):
            stage_smem, factors_smem = scratch["stages"].at[at], scratch["factors"].at[at]
            sums = add_products(sums, stage_smem, factors_smem, scratch["weights"].at[0], me)
        plgpu.barrier_arrive(scratch["added"].at[at])
        return sums

    zeros = plgpu.layout_cast(jnp.zeros((64, HEADS), jnp.float32), columns.ACCUMULATOR)
    return lax.fori_loop(0, named.blocks, step, [zeros] * OPERANDS)


def add_products(sums: list[jax.Array], stage_smem, factors_smem, weights_smem, me: jax.Array) -> list[jax.Array]:
    """sums + entries.T @ weights, in their registers. (There are none for the operands of two steps.)"""
    steps = range(BLOCK // STEP)

    def weights(step: int):
        return weights_smem.at[pl.ds(step * STEP, STEP)]

    if is_interpreted():
        for step in steps:
            made = operands(stage_smem, factors_smem, me, step)
            held = weights(step)[...]
            sums = [x + jnp.dot(y, held, preferred_element_type=jnp.float32) for x, y in zip(sums, made, strict=True)]
        return sums

    def multiply(accumulators):
        for step in steps:
            made = operands(stage_smem, factors_smem, me, step)
            for accumulator, operand in zip(accumulators, made, strict=True):
                plgpu.wgmma(accumulator, operand, weights(step))
            plgpu.wgmma_wait(0)

    return pl.run_state(multiply)([plgpu.ACC.init(x) for x in sums])  # pyright: ignore[reportReturnType]


def faded(sums: list[jax.Array], fade_smem) -> list[jax.Array]:
    return scaled(sums, of_heads(fade_smem))


def scaled(sums: list[jax.Array], factor: jax.Array) -> list[jax.Array]:
    return [x * lax.broadcast_in_dim(factor, x.shape, [1]) for x in sums]

"""Products of the flattened streams with the mix projection on Hopper, in float32's precision by bfloat16 wgmmas.

    partial[p, t, o] = sum over the columns k of part p of f[t, k] fn[o, k],    partial[p, t, 24] = sum of f[t, k]^2

f [m, K] is bfloat16. fn [24, K] is float32, the exact sum of three bfloat16 terms (8 of its 24 bits each), so that
wgmmas with float32 sums lose nothing: TF32 would keep 11 bits. The terms are 72 rows of one operand, so that a wgmma
reads the streams once for all. A thread block keeps the terms of its columns in shared memory and meets tiles of 64
tokens: one warpgroup copies [64, 128] units of them (TMA) into `stages` buffers, multiplies, and squares what it reads
meanwhile. Units are added in one order (in pairs, then the pairs), whichever thread block has them: a token's bits
depend neither on other tokens nor on their number.

Bound: 2 m K bytes / 3.35 TB/s; a unit is 8 wgmmas of 64 x 72 x 16, some 36 cycles each, where 132 SMs wait some 1200
cycles for its 16 KB.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.pallas.mosaic_gpu.primitives import wgmma_accumulator_load

from pallas_kernels.block_matmul.kernel_sm90 import ROWS, swizzled
from pallas_kernels.hyper_connection.handover_sm90 import Handover, Nothing, Unsaid
from pallas_kernels.hyper_connection.partials_sm90 import Partials, Words
from pallas_kernels.hyper_connection.share_sm90 import Share
from pallas_kernels.hyper_connection.split_sm90 import SHARE, SWIZZLED, TERMS, split_terms
from pallas_kernels.hyper_connection.tiling import MIXED, TILE, TMA_ROWS, UNIT, PreTiling

MOST_APART = 2  # units whose squares are summed before products: with more, registers spill


def scratch(tiling: PreTiling) -> dict[str, Any]:
    return {
        "unit": plgpu.SMEM((tiling.stages, TILE, UNIT), jnp.bfloat16, transforms=swizzled(2)),
        "fn": plgpu.SMEM((TERMS * MIXED, tiling.units * UNIT), jnp.bfloat16, transforms=SWIZZLED),
        "filled": plgpu.Barrier(num_arrivals=1, num_barriers=tiling.stages),
        "split": plgpu.Barrier(num_arrivals=MIXED // SHARE),
    }


def whole_tiles(f: jax.Array) -> jax.Array:
    """f [m, K] with zeros up to a multiple of the 8 rows that TMA copies at a time; fewer rows it takes as they are."""
    tokens = len(f)
    return f if tokens <= TMA_ROWS else jnp.pad(f, ((0, -tokens % TMA_ROWS), (0, 0)))


def project(
    f_gmem: Any,
    fn_gmem: Any,
    partials: Partials | Words,
    *,
    share: Share,
    tiling: PreTiling,
    handover: Handover | Unsaid | Nothing,
    splits: bool = True,
    unit: Any,
    fn: Any,
    filled: Any,
    split: Any,
) -> None:
    """Partials of the thread block's tiles, by one warpgroup.

    splits: whether it splits a third of fn; else three others do.
    """
    units, stages = tiling.units, tiling.stages
    steps = share.tiles * units

    def load(step: Any) -> None:
        i, c = lax.div(step, units), lax.rem(step, units)
        rows, columns = pl.ds(share.tile(i) * TILE, TILE), pl.ds((share.part * units + c) * UNIT, UNIT)
        slot = lax.rem(step, stages)
        # Rows behind the last token come as zeros.
        plgpu.copy_gmem_to_smem(f_gmem.at[rows, columns], unit.at[slot], filled.at[slot])

    for step in range(stages):
        pl.when(step < steps)(lambda step=step: load(jnp.int32(step)))
    if splits:
        split_terms(fn_gmem, fn, split, share=share, units=units, sharer=0)
    if share.cut.most_tiles == 1 and units <= min(stages, MOST_APART):
        with jax.named_scope("sum squares"):  # while fn is on its way
            squares = sum_of(squares_behind(filled.at[c], unit.at[c]) for c in range(units))
        plgpu.barrier_wait(split)
        with jax.named_scope("multiply"):
            product = sum_of(product_of(unit.at[c], fn.at[:, pl.ds(c * UNIT, UNIT)]) for c in range(units))
        with jax.named_scope("hand over"):
            partials.store(jnp.int32(0), product, squares)
            handover.done(jnp.int32(0))
        return
    plgpu.barrier_wait(split)

    def of_unit(i: jax.Array, c: Any) -> tuple[jax.Array, jax.Array]:
        step = i * units + c
        slot = lax.rem(step, stages)
        with jax.named_scope("wait for streams"):
            plgpu.barrier_wait(filled.at[slot])
        with jax.named_scope("multiply"):
            sums = unit_sums(unit.at[slot], fn.at[:, pl.ds(c * UNIT, UNIT)])
        plgpu.commit_smem()  # everyone has read the unit

        @pl.when(step + stages < steps)
        def _next():
            with jax.named_scope("wait for finishers"):
                pl.when(lax.rem(step + stages, units) == 0)(lambda: handover.may_load(lax.div(step + stages, units)))
            load(step + stages)

        return sums

    @pl.loop(0, share.tiles)
    def _tile(i):
        def add_pair(pair, sums):
            of_pair = of_unit(i, 2 * pair)
            if units > 1:
                of_pair = added(of_pair, of_unit(i, 2 * pair + 1))
            return added(sums, of_pair)

        zeros = (
            plgpu.layout_cast(jnp.zeros((TILE, MIXED), jnp.float32), plgpu.Layout.WGMMA),
            plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), ROWS),
        )
        product, squares = lax.fori_loop(0, max(units // 2, 1), add_pair, zeros)
        with jax.named_scope("hand over"):
            partials.store(i, product, squares)
            handover.done(i)


def unit_sums(f_smem: Any, fn_smem: Any) -> tuple[jax.Array, jax.Array]:
    """Products [64, 24] and squares [64] of a unit, which are summed while it is multiplied."""

    def product(accumulator):
        plgpu.wgmma(accumulator, f_smem, fn_smem.T)
        squares = squares_of(f_smem)
        return wgmma_accumulator_load(accumulator, wait_n=0), squares

    of_terms, squares = pl.run_scoped(product, plgpu.ACC((TILE, TERMS * MIXED), jnp.float32))
    return sum_of_terms(of_terms), squares


def product_of(f_smem: Any, fn_smem: Any) -> jax.Array:
    """Products [64, 24] of a unit."""

    def product(accumulator):
        plgpu.wgmma(accumulator, f_smem, fn_smem.T)
        return wgmma_accumulator_load(accumulator, wait_n=0)

    return sum_of_terms(pl.run_scoped(product, plgpu.ACC((TILE, TERMS * MIXED), jnp.float32)))


def sum_of_terms(of_terms: jax.Array) -> jax.Array:
    """Of products [64, 72] with all three terms."""
    large, middle, small = (of_terms[:, term * MIXED : (term + 1) * MIXED] for term in range(TERMS))
    return small + middle + large


def squares_behind(filled: Any, f_smem: Any) -> jax.Array:
    plgpu.barrier_wait(filled)
    return squares_of(f_smem)


def squares_of(f_smem: Any) -> jax.Array:
    """[64], of a unit."""
    wide = plgpu.load(f_smem, layout=plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)
    return jnp.sum(wide * wide, axis=1)


def sum_of(units: Iterable[jax.Array]) -> jax.Array:
    """Of one or two: in the order in which tile after tile is summed."""
    return functools.reduce(jnp.add, units)


def added(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))

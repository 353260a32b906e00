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

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.pallas.mosaic_gpu.primitives import wgmma_accumulator_load

from pallas_kernels.block_matmul.kernel_sm90 import ROWS, swizzled
from pallas_kernels.hyper_connection.handover_sm90 import Handover, Nothing
from pallas_kernels.hyper_connection.share_sm90 import Cut, Share
from pallas_kernels.hyper_connection.tiling import GROUP, MIXED, STREAMS, TILE, TMA_ROWS, UNIT, PreTiling
from pallas_kernels.mosaic.launch import store_narrow
from pallas_kernels.quantize_rows.kernel_sm90 import registers

TERMS = 3  # bfloat16 terms of a float32
SHARE = 8  # outputs, whose columns of fn one of three warpgroups splits
ROW = 32  # columns of a partial's row: 24, the squares, and as many as a warp has lanes
SQUARES = MIXED  # the column of the squares


def scratch(tiling: PreTiling) -> dict[str, Any]:
    return {
        "unit": plgpu.SMEM((tiling.stages, TILE, UNIT), jnp.bfloat16, transforms=swizzled(2)),
        "fn": plgpu.SMEM((TERMS * MIXED, tiling.units * UNIT), jnp.bfloat16, transforms=swizzled(2)),
        "filled": plgpu.Barrier(num_arrivals=1, num_barriers=tiling.stages),
        "split": plgpu.Barrier(num_arrivals=MIXED // SHARE),
    }


def partial_type(of: Cut, width: int, tiling: PreTiling, ring: int) -> jax.ShapeDtypeStruct:
    """Parts by groups, and rows of `ring` tiles of every team, of which only the tokens mean anything."""
    groups, each = STREAMS * width // (UNIT * GROUP), GROUP // tiling.units
    return jax.ShapeDtypeStruct((groups, each, of.teams * ring * TILE, ROW), jnp.float32)


def whole_tiles(f: jax.Array) -> jax.Array:
    """f [m, K] with zeros up to a multiple of the 8 rows that TMA copies at a time; fewer rows it takes as they are."""
    tokens = len(f)
    return f if tokens <= TMA_ROWS else jnp.pad(f, ((0, -tokens % TMA_ROWS), (0, 0)))


def project(
    f_gmem: Any,
    fn_gmem: Any,
    partial_gmem: Any,
    *,
    share: Share,
    tiling: PreTiling,
    ring: int,
    handover: Handover | Nothing,
    unit: Any,
    fn: Any,
    filled: Any,
    split: Any,
) -> None:
    """Partials of the thread block's tiles, by one warpgroup.

    ring: tiles of a team's that partial_gmem holds.
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
    split_terms(fn_gmem, fn, split, share=share, units=units, sharer=0)
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
        each = GROUP // units
        group, of_group = lax.div(share.part, each), lax.rem(share.part, each)
        rows = pl.ds(share.rows(i, ring), TILE)
        with jax.named_scope("hand over"):
            store_narrow(partial_gmem, (group, of_group, rows, pl.ds(0, MIXED)), product)  # rows of 96 bytes
            store_narrow(partial_gmem, (group, of_group, rows, SQUARES), squares)
            handover.done(i)


def unit_sums(f_smem: Any, fn_smem: Any) -> tuple[jax.Array, jax.Array]:
    """Products [64, 24] and squares [64] of a unit."""

    def product(accumulator):
        plgpu.wgmma(accumulator, f_smem, fn_smem.T)
        wide = plgpu.load(f_smem, layout=plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)
        squares = jnp.sum(wide * wide, axis=1)
        return wgmma_accumulator_load(accumulator, wait_n=0), squares

    of_terms, squares = pl.run_scoped(product, plgpu.ACC((TILE, TERMS * MIXED), jnp.float32))
    large, middle, small = (of_terms[:, term * MIXED : (term + 1) * MIXED] for term in range(TERMS))
    return small + middle + large, squares


def added(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def split_terms(fn_gmem: Any, fn_smem: Any, split: Any, *, share: Share, units: int, sharer: Any) -> None:
    """A third of the thread block's fn as three bfloat16 terms, each of what the ones before it leave.

    Exact but for subnormal rests. sharer: which third; all of them arrive at `split`.
    """
    outputs = pl.ds(sharer * SHARE, SHARE)
    columns = [pl.ds((share.part * units + c) * UNIT, UNIT) for c in range(units)]
    loaded = [plgpu.load(fn_gmem.at[outputs, at], layout=registers(SHARE), optimized=False) for at in columns]
    for c, rest in enumerate(loaded):
        for term in range(TERMS):
            rounded = rest.astype(jnp.bfloat16)
            fn_smem[pl.ds(term * MIXED + sharer * SHARE, SHARE), pl.ds(c * UNIT, UNIT)] = rounded
            rest = rest - rounded.astype(jnp.float32)
    plgpu.commit_smem()
    plgpu.barrier_arrive(split)

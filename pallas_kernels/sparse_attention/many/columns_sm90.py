"""Columns of an accumulator [64, n] whose rows are spread over a warpgroup, on Hopper: sums, maxima, a question.

wgmma leaves a row in four lanes and a column in all four warps. Rows are what Pallas reduces well; a column it would
leave, reduced, in every lane. Here each of a warp's lanes ends up with two of the 64 columns, by half as many shuffles.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.mosaic.addresses import constant, i32
from pallas_kernels.mosaic.interpreter import is_interpreted

ACCUMULATOR = plgpu.Layout.WGMMA
WARPS, COLUMNS, BLOCKS = 4, 64, 8  # of columns: eight neighbours in four lanes
# [WARPS, COLUMNS]: a row a warp, two columns a lane.
OF_WARPS = plgpu.Layout.TILED(plgpu.Tiling(((WARPS, COLUMNS), (2,))), (-3,), (-2,), -1)
Reduce = Callable[[Any, Any], Any]


def sums_of_warps(x: jax.Array) -> jax.Array:
    """float32 [WARPS, COLUMNS] in OF_WARPS: the sum of the 16 rows of x [64, COLUMNS] that each warp has."""
    return _of_warps(x, jnp.sum, arith.addf)


def maxima_of_warps(x: jax.Array) -> jax.Array:
    """The same, their maximum."""
    return _of_warps(x, jnp.max, arith.maximumf)


def _of_warps(x: jax.Array, in_jnp: Callable[..., jax.Array], of_two: Reduce) -> jax.Array:
    if is_interpreted():
        return in_jnp(x.reshape(WARPS, -1, COLUMNS), axis=1)
    found = plgpu.ShapeDtypeStruct((WARPS, COLUMNS), x.dtype, layout=OF_WARPS)

    @plgpu.inline_mgpu(arg_types=(ACCUMULATOR,), return_type=found)
    def reduce(_ctx: Any, x: Any) -> Any:
        pairs = x.registers.reshape(BLOCKS, 2)  # of which a lane has two rows
        blocks = [[of_two(*(vector.extract(pair, [], [i]) for pair in rows)) for i in range(2)] for rows in pairs]
        lane = arith.remui(utils.thread_idx(), constant(32))
        for bit in (2, 1, 0):  # of the block that a lane keeps: of two it hands the other's on
            mask = constant(4 << bit)
            upper = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(lane, mask), constant(0))
            half = len(blocks) // 2
            blocks = [
                [_traded(low, high, upper, 4 << bit, of_two) for low, high in zip(*both, strict=True)]
                for both in zip(blocks[:half], blocks[half:], strict=True)
            ]
        (pair,) = blocks
        registers = np.empty(OF_WARPS.to_mgpu().registers_shape((WARPS, COLUMNS)), dtype=object)
        registers.flat[0] = vector.from_elements(ir.VectorType.get((2,), pair[0].type), pair)
        return mgpu.FragmentedArray(_registers=registers, _layout=OF_WARPS.to_mgpu(), _is_signed=None)

    return reduce(x)


def _traded(low: ir.Value, high: ir.Value, upper: ir.Value, distance: int, of_two: Reduce) -> ir.Value:
    kept, handed = arith.select(upper, high, low), arith.select(upper, low, high)
    return of_two(kept, utils.shfl_bfly(handed, distance))


def any_above(x: jax.Array, bound: jax.Array) -> jax.Array:
    """Whether anything of x [64, n] is above `bound` [n] of its column, the same for all threads of a warpgroup.

    They have all read `bound` from wherever it lies when one of them goes on.
    """
    if is_interpreted():
        return jnp.any(x > bound[None])
    found = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=plgpu.Layout.WG_SPLAT(()))

    @plgpu.inline_mgpu(arg_types=(ACCUMULATOR, ACCUMULATOR.reduce(0)), return_type=found)
    def ask(_ctx: Any, x: Any, bound: Any) -> Any:
        mine = arith.constant(ir.IntegerType.get_signless(1), 0)
        for pairs, bounds in zip(x.registers.reshape(-1, 2), bound.registers.flat, strict=True):
            for pair in pairs:
                for i in range(2):
                    value, limit = (vector.extract(of, [], [i]) for of in (pair, bounds))
                    mine = arith.ori(mine, arith.cmpf(arith.CmpFPredicate.OGT, value, limit))
        together = llvm.inline_asm(
            i32(),
            [arith.extui(i32(), mine), utils.warpgroup_barrier_idx(sync=False)],
            "{ .reg .pred p, q; setp.ne.b32 p, $1, 0; bar.red.or.pred q, $2, 128, p; selp.b32 $0, 1, 0, q; }",
            "=r,r,r",
            has_side_effects=True,
        )
        return mgpu.FragmentedArray.splat(together, (), is_signed=True)

    return ask(x, bound) != 0

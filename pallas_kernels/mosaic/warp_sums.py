"""Sums over a warpgroup's registers, warp by warp, through memory of the caller's.

Mosaic's own sums across warps go through one buffer of the thread block: two warpgroups that sum at the same time spoil
each other's, and nothing reports it.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.mosaic.interpreter import is_interpreted

WARPS = 4  # of a warpgroup
_LANES = 32


def store(ref: Any, x: jax.Array, layout: Any) -> None:
    """ref[w] = the sum of what warp w has of float32 x; `layout` holds nothing twice. ref [4] in shared memory."""
    if is_interpreted():
        ref[...] = jnp.sum(x.reshape(WARPS, -1), axis=1)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))
    def run(_ctx: Any, ref: Any, x: Any) -> None:
        numbers = [
            vector.extract(register, [], [i]) for register in x.registers.flat for i in range(register.type.shape[0])
        ]
        total = functools.reduce(arith.addf, numbers)
        for distance in (16, 8, 4, 2, 1):
            total = arith.addf(total, utils.shfl_bfly(total, distance))
        word = ir.IntegerType.get_signless(32)
        thread = arith.remui(utils.thread_idx(), utils.c(WARPS * _LANES, word))
        first = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(thread, utils.c(_LANES, word)), utils.c(0, word))
        with utils.when(first):
            warp = arith.divui(thread, utils.c(_LANES, word))
            llvm.store(total, utils.getelementptr(utils.memref_ptr(ref), [warp], ir.F32Type.get()))

    run(ref, x)

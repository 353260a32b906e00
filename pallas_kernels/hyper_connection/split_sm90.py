"""mHC's mix projection as bfloat16 terms in shared memory, on Hopper."""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.block_matmul.kernel_sm90 import swizzled
from pallas_kernels.hyper_connection.share_sm90 import Share
from pallas_kernels.hyper_connection.tiling import MIXED, UNIT
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.quantize_rows.kernel_sm90 import registers

TERMS = 3  # bfloat16 terms of a float32
SHARE = 8  # outputs, whose columns of fn one of three warpgroups splits; rows of a tile of shared memory
SWIZZLED = swizzled(2)  # tiles of 8 rows by 64 columns


def split_terms(fn_gmem: Any, fn_smem: Any, split: Any, *, share: Share, units: int, sharer: Any) -> None:
    """A third of the thread block's fn as three bfloat16 terms, each of what the ones before it leave.

    Exact but for subnormal rests. sharer: which third; all of them arrive at `split`. fn_smem: SWIZZLED [72, units of
    columns], row term * 24 + output.
    """
    outputs = pl.ds(sharer * SHARE, SHARE)
    columns = [pl.ds((share.part * units + c) * UNIT, UNIT) for c in range(units)]
    rests = [plgpu.load(fn_gmem.at[outputs, at], layout=registers(SHARE), optimized=False) for at in columns]
    terms = []
    for _ in range(TERMS):
        terms.append([rest.astype(jnp.bfloat16) for rest in rests])
        rests = [rest - rounded.astype(jnp.float32) for rest, rounded in zip(rests, terms[-1], strict=True)]
    store(fn_smem, jnp.int32(sharer), terms)
    plgpu.commit_smem()
    plgpu.barrier_arrive(split)


def store(fn_smem: Any, sharer: jax.Array, terms: list[list[jax.Array]]) -> None:
    """Terms by unit, each [8, 128]: a store for each of them by Pallas has two barriers about it."""
    if is_interpreted():
        for term, of_units in enumerate(terms):
            for c, values in enumerate(of_units):
                fn_smem[pl.ds(term * MIXED + sharer * SHARE, SHARE), pl.ds(c * UNIT, UNIT)] = values
        return
    layouts = [[registers(SHARE)] * len(of_units) for of_units in terms]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(SWIZZLED), plgpu.Layout.WG_SPLAT(()), layouts))
    def run(_ctx: Any, to: ir.Value, sharer: Any, terms: Any) -> None:
        tiles = ir.MemRefType(to.type).shape[1] // len(terms[0])  # of a unit's columns
        for term, of_units in enumerate(terms):
            first = utils.c(term * MIXED // SHARE, ir.IntegerType.get_signless(32))
            row = arith.index_cast(ir.IndexType.get(), arith.addi(first, sharer.registers.item()))
            for c, values in enumerate(of_units):
                at = utils.DynamicSlice(row, 1), slice(c * tiles, (c + 1) * tiles)
                values.store_tiled(utils.memref_slice(to, at), swizzle=SWIZZLED[1].swizzle)

    run(fn_smem, sharer, terms)

"""The end of a query: sums of weights to the softmax's denominators, the sink, the log-sum-exp, and out.

Accumulators have channels as rows. A thread has eight neighbouring channels of a head, so that the output leaves from
registers.
"""

# Mosaic's Python is not typed for outsiders, and Pallas' transforms look abstract.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from pallas_kernels.mosaic.addresses import fragmented
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.launch import store_narrow
from pallas_kernels.sparse_attention.many.add_sm90 import ADDERS
from pallas_kernels.sparse_attention.many.epilogue_sm90 import Whole, denominators
from pallas_kernels.sparse_attention.many.score_sm90 import Scratch, of_heads
from pallas_kernels.sparse_attention.staged.add_sm90 import scaled
from pallas_kernels.sparse_attention.turn_sm90 import turned
from pallas_kernels.sparse_attention.units_sm90 import HEADS, Unit

SIDE = 256  # channels of an adder
# [HEADS, SIDE]: eight heads in four lanes, two each; a warp has 64 channels, eight lanes eight of them each.
OUT = plgpu.Layout.TILED(plgpu.Tiling(((8, SIDE), (2, 64), (2, 8))), (-5,), (-3, -6), -1)


def finish(
    unit: Unit,
    blocks: jax.Array,
    last: jax.Array,
    sums: Sequence[jax.Array],
    scratch: Scratch,
    me: jax.Array,
    whole: Whole,
    out_gmem: Any,
    lse_gmem: Any,
) -> None:
    """This adder's half of the channels of the output, and the log-sum-exp without the sink.

    sums: of `blocks` blocks of entries, of which scorer `last` had the last one.
    """
    with jax.named_scope("wait for sums"):
        plgpu.barrier_wait(scratch["summed"])  # and nobody reads q any more
    share, lse = denominators(blocks, last, scratch, unit, whole.sink_gmem, of_heads)
    with jax.named_scope("put"):
        out = turned_round(scaled(list(sums), share))
        for adder in range(ADDERS):

            @pl.when(me == adder)
            def _put(adder=adder):
                here, x = pl.ds(adder * SIDE, SIDE), out
                if whole.factors_gmem is not None and (adder + 1) * SIDE > whole.turned_from:
                    x = turned(x, *(of_channels(whole.factors_gmem.at[unit.query, j, here]) for j in range(2)), OUT)
                to = out_gmem.at[unit.split, unit.query, unit.heads]
                store_narrow(to, (slice(None), here), x.astype(out_gmem.dtype))

    @pl.when(me == 0)
    def _lse():
        lse_gmem[unit.split, unit.query, unit.heads] = lse


def of_channels(ref: Any) -> jax.Array:
    """What is the same for all heads."""
    x = plgpu.load(ref, layout=OUT.reduce(0), optimized=False)
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (HEADS, SIDE), [1]), OUT)


def turned_round(sums: list[jax.Array]) -> jax.Array:
    """[HEADS, SIDE] in OUT of accumulators [64, HEADS], see stage_sm90: threads keep what they hold."""
    if is_interpreted():
        rows = jnp.stack(sums).reshape(len(sums), 4, 2, 8, HEADS)  # operand, warp, half, lane
        return rows.transpose(4, 1, 3, 0, 2).reshape(HEADS, SIDE)
    held = (plgpu.Layout.WGMMA,) * len(sums)
    found = plgpu.ShapeDtypeStruct((HEADS, SIDE), jnp.dtype(jnp.float32), layout=OUT)

    @plgpu.inline_mgpu(arg_types=held, return_type=found)
    def run(_ctx: Any, *sums: Any) -> Any:
        of_each = [x.registers.reshape(8, 2) for x in sums]  # eight heads, half of the rows
        kind = ir.VectorType.get((8,), ir.F32Type.get())
        registers = np.empty(16, dtype=object)
        for i in range(16):
            eight, neighbour = divmod(i, 2)
            values = [vector.extract(x[eight, half], [], [neighbour]) for x in of_each for half in range(2)]
            registers[i] = vector.from_elements(kind, values)
        return fragmented(registers.reshape(OUT.to_mgpu().registers_shape((HEADS, SIDE))), OUT, None)

    return run(*sums)

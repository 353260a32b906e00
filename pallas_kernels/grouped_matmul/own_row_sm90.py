"""A row that every thread block quantises for itself, where wgmma reads it: for kernels of one token.

The row is wgmma's N of eight, of which it is the first: what lies in the other seven never reaches its column of a
product. A launch before that quantises for all, and the wait for it, are left out; the row comes from the L2 cache
while the first weights come from memory.
"""

# Pallas's types cannot be followed, and Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAbstractUsage=false, reportCallIssue=false

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.block_matmul.pipeline_sm90 import BLOCK, COLUMNS, swizzled
from pallas_kernels.formats import QuantFormat
from pallas_kernels.grouped_matmul.one_token_tiling import ROWS
from pallas_kernels.mosaic import e2m1_apart, e2m1_registers
from pallas_kernels.mosaic.addresses import i32
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.scales import activation_bits
from pallas_kernels.mosaic.warp import element
from pallas_kernels.quantize_rows.kernel_sm90 import quantized, registers

AT_ONCE = 8  # groups of 128 columns that a warpgroup quantises


class OwnRow(NamedTuple):
    """`steps` x `blocks` groups of 128 columns, of which each of `warpgroups` consumers quantises some.

    evens: whether codes lie in the order that MXFP4's are spread in (e2m1_apart.py).
    """

    steps: int
    blocks: int
    warpgroups: int
    form: QuantFormat
    evens: bool = False

    @property
    def groups(self) -> int:
        return self.steps * self.blocks

    def scratch(self) -> dict[str, Any]:
        """Codes by step, as wgmma reads them, scales by group, float32 or its bits, and a barrier of consumers."""
        words = jnp.int32 if self.form.scale == "ue8m0" else jnp.float32
        return {
            "row": plgpu.SMEM((self.steps, ROWS, self.blocks * BLOCK), self.form.values_dtype, transforms=swizzled(1)),
            "row_scale": plgpu.SMEM((self.groups,), words),
            "row_met": plgpu.Barrier(num_arrivals=self.warpgroups),
        }

    def scales(self, scratch: dict[str, Any], group: Any) -> jax.Array:
        """Of a group, [8]: the row's, and as much for the others."""
        return plgpu.layout_cast(lax.broadcast_in_dim(scratch["row_scale"][group], (ROWS,), ()), COLUMNS)

    def quantise(self, row_gmem: Any, first: Any, scratch: dict[str, Any]) -> None:
        """Groups from `first` on of row_gmem [G, 128], by all consumers; it ends when all of them are there."""
        each = math.gcd(self.groups, AT_ONCE)
        count, layout = self.groups // each, registers(each)
        assert each % self.blocks == 0, f"{self.blocks} blocks a step: {AT_ONCE} at most"
        warpgroup = lax.axis_index("warpgroup")
        own = [warpgroup + turn * self.warpgroups for turn in range(-(-count // self.warpgroups))]
        pieces = [row_gmem.at[pl.ds(first + jnp.minimum(piece, count - 1) * each, each)] for piece in own]
        loaded = [plgpu.load(piece, layout=layout, optimized=False) for piece in pieces]

        def write(piece: Any, wide: jax.Array) -> None:
            codes, scale = quantized(wide.astype(jnp.float32), self.form, layout)
            held = scratch["row"].at[pl.ds(piece * (each // self.blocks), each // self.blocks)]
            scales = scratch["row_scale"].at[pl.ds(piece * each, each)]
            store(held, scales, codes, activation_bits(scale), layout, self.evens)

        for piece, wide in zip(own, loaded, strict=True):
            if count % self.warpgroups:
                pl.when(piece < count)(functools.partial(write, piece, wide))
            else:
                write(piece, wide)
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch["row_met"])
        plgpu.barrier_wait(scratch["row_met"])


def store(row_smem: Any, scale_smem: Any, codes: jax.Array, scale: jax.Array, layout: Any, evens: bool) -> None:
    """The first rows of row_smem [steps, 8, blocks x 128], which is swizzled, become codes [steps x blocks, 128].

    And scale_smem [steps x blocks] their scales: Mosaic's own store of a vector has no word for few of them.
    """
    if is_interpreted():
        steps, _, columns = row_smem.shape
        row_smem[:, 0] = (e2m1_apart.evens_and_odds(codes) if evens else codes).reshape(steps, columns)
        scale_smem[...] = scale
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(swizzled(1)), plgpu.RefType(), layout, layout.reduce(1)))
    def run(_ctx: Any, row: ir.Value, scales: ir.Value, codes: Any, scale: Any) -> None:
        # Tiles of eight rows lie one behind the other; the swizzle leaves the first 128 bytes of each where they are.
        put = e2m1_registers.put_evens if evens else e2m1_registers.put_words
        put(row, codes, ROWS * BLOCK)
        for register, (group,) in zip(scale.registers.flat, scale.layout.thread_idxs(scale.shape), strict=True):
            llvm.store(register, element(scales, arith.index_cast(i32(), group)), alignment=4)

    run(row_smem, scale_smem, codes, scale)

"""What becomes of the results of fp4_sm90: rows as they are, or their codes, as the next product takes them.

Consumers have results transposed, 64 channels x tokens. Rows go out by TMA. Codes have a scale for 128 channels, which
two slabs share: all consumers leave their results in shared memory, and take some of the tokens each.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.block_matmul.pipeline_sm90 import BLOCK, WGMMA_ROWS
from pallas_kernels.formats import QuantFormat
from pallas_kernels.grouped_matmul import rows_sm90
from pallas_kernels.mosaic.launch import store_narrow
from pallas_kernels.quantize_rows.kernel_sm90 import quantized, registers


class Plain(NamedTuple):
    """y [M, N] in `dtype`; in four bytes [N, M], for of registers only halves are transposed on their way out."""

    m: int
    n: int
    rows: int
    warpgroups: int
    parts: int
    dtype: DTypeLike

    @property
    def transposed(self) -> bool:
        return jnp.dtype(self.dtype).itemsize != 2

    def outputs(self) -> tuple[Any, ...]:
        return (jax.ShapeDtypeStruct((self.n, self.m) if self.transposed else (self.m, self.n), self.dtype),)

    def scratch(self) -> dict[str, Any]:
        slab = (WGMMA_ROWS, self.rows) if self.transposed else (self.rows, WGMMA_ROWS)
        return {"y": plgpu.SMEM((self.warpgroups, *slab), self.dtype)}

    def write(self, of_parts: Sequence[jax.Array], block: Any, tile: Any, warpgroup: Any, outs: Any, scratch: Any):
        (y_gmem,), y_smem, tokens = outs, scratch["y"], pl.ds(block * self.rows, self.rows)
        for p, y in enumerate(of_parts):
            slab = (tile * self.warpgroups + warpgroup) * self.parts + p
            channels = pl.ds(slab * WGMMA_ROWS, WGMMA_ROWS)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if self.transposed:
                y_smem[warpgroup] = y.astype(self.dtype)
            else:
                y_smem.at[warpgroup].T[...] = y.astype(self.dtype)
            plgpu.commit_smem()
            target = y_gmem.at[channels, tokens] if self.transposed else y_gmem.at[tokens, channels]
            plgpu.copy_smem_to_gmem(y_smem.at[warpgroup], target)

    def finish(self) -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def result(self, y: jax.Array) -> jax.Array:
        return y.T if self.transposed else y


class Codes(NamedTuple):
    """What rows_sm90.quantized_rows makes of y [M, N] bfloat16."""

    m: int
    n: int
    rows: int
    warpgroups: int
    parts: int
    form: QuantFormat
    folded: bool  # whether scales are in the product that takes them

    @property
    def groups(self) -> int:
        """Of 128 channels, of a tile."""
        return self.warpgroups * self.parts // 2

    @property
    def tokens_at_once(self) -> int:
        """Of a group, for one consumer: whole eights, which are the tiles of shared memory that stores allow."""
        each = self.rows // self.warpgroups
        return each if self.rows % (8 * self.warpgroups) == 0 else 8

    def outputs(self) -> tuple[Any, ...]:
        codes = jax.ShapeDtypeStruct((self.m, self.n // BLOCK, BLOCK), self.form.values_dtype)
        return codes, rows_sm90.scales_type(self.m, self.rows, self.n, self.form)

    def scratch(self) -> dict[str, Any]:
        return {
            "y": plgpu.SMEM((self.groups, self.rows, BLOCK), jnp.bfloat16),
            "meet": plgpu.Barrier(num_arrivals=self.warpgroups),
        }

    def write(self, of_parts: Sequence[jax.Array], block: Any, tile: Any, warpgroup: Any, outs: Any, scratch: Any):
        (codes_gmem, scale_gmem), y_smem = outs, scratch["y"]

        def meet() -> None:
            plgpu.barrier_arrive(scratch["meet"])
            plgpu.barrier_wait(scratch["meet"])

        meet()  # the tile before has been read
        for p, y in enumerate(of_parts):
            slab = warpgroup * self.parts + p
            channels = pl.ds(lax.rem(slab, 2) * WGMMA_ROWS, WGMMA_ROWS)
            y_smem.at[lax.div(slab, 2), :, channels].T[...] = y.astype(jnp.bfloat16)
        meet()
        each, layout = self.tokens_at_once, registers(self.tokens_at_once)
        pieces = self.rows // each  # of a group, for as many consumers or fewer

        def quantise(piece: Any) -> None:
            g, start = lax.div(piece, pieces), lax.rem(piece, pieces) * each
            tokens = pl.ds(start, each)
            wide = plgpu.load(y_smem.at[g, tokens], layout=layout, optimized=False).astype(jnp.float32)
            codes, scale = quantized(wide, self.form, layout)
            group = tile * self.groups + g
            here = pl.ds(block * self.rows + start, each)
            rows_sm90.store_codes(codes_gmem.at[here, group], codes, layout, self.folded)
            store_narrow(scale_gmem, (block, group, tokens), rows_sm90.scale_words(scale, self.form))

        for first in range(0, self.groups * pieces, self.warpgroups):
            piece = first + warpgroup
            pl.when(piece < self.groups * pieces)(functools.partial(quantise, piece))

    def finish(self) -> None:
        pass

    def result(self, codes: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        return codes.reshape(self.m, self.n), scale

"""What becomes of finished rows of kernel_sm90: they go out as they are, or as the codes that a next product takes."""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.block_matmul.cut import CONSUMERS, Cut
from pallas_kernels.block_matmul.pipeline_sm90 import BLOCK, WGMMA_ROWS, swizzled
from pallas_kernels.block_matmul.tiling import ManyRows
from pallas_kernels.formats import QuantFormat
from pallas_kernels.mosaic import row_store
from pallas_kernels.mosaic.launch import store_narrow
from pallas_kernels.quantize_rows.kernel_sm90 import quantized


def makes_codes(tiling: ManyRows) -> bool:
    """Whether its results can be `Codes`."""
    return (tiling.tile_n, tiling.split, tiling.shares) == (BLOCK, "rows", 1)


class Plain(NamedTuple):
    """y [M, N] in `dtype`.

    It goes out through two buffers, so that one is copied while the next is written. Where thread blocks have
    `one_each` of the tiles it goes straight from registers: no later than its copies would, by up to 3 %. Behind it,
    the next tile would wait longer for these stores than for copies (2 to 4 %).
    """

    cut: Cut
    dtype: DTypeLike
    one_each: bool

    @property
    def from_registers(self) -> bool:
        """Not where rows are float32, or too narrow: the 64 columns that four thread blocks share out, for one."""
        two_bytes = jnp.dtype(self.dtype).itemsize == row_store.BYTES
        return self.one_each and two_bytes and self.cut.finished % row_store.COLUMNS == 0

    def outputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return (jax.ShapeDtypeStruct((self.cut.m, self.cut.n), self.dtype),)

    def scratch(self) -> dict[str, Any]:
        cut = self.cut
        if self.from_registers:
            return {}
        layout = swizzled(jnp.dtype(self.dtype).itemsize, cut.stored)
        return {"y": plgpu.SMEM((CONSUMERS, cut.pieces, WGMMA_ROWS, cut.stored), self.dtype, transforms=layout)}

    def write(self, y: jax.Array, rows: Any, first_column: Any, warpgroup: Any, outs: Any, scratch: Any) -> None:
        """float32 y [64, columns], which are `rows` from `first_column` on."""
        (y_gmem,), stored, pieces = outs, self.cut.stored, self.cut.pieces
        y = y.astype(self.dtype)
        if self.from_registers:
            row_store.store(y_gmem.at[rows, pl.ds(first_column, self.cut.finished)], y)
            return
        y_smem = scratch["y"]
        for piece in range(pieces):
            plgpu.wait_smem_to_gmem(pieces - 1, wait_read_only=True)
            y_smem[warpgroup, piece] = y[:, piece * stored : (piece + 1) * stored]
            plgpu.commit_smem()
            columns = pl.ds(first_column + piece * stored, stored)
            plgpu.copy_smem_to_gmem(y_smem.at[warpgroup, piece], y_gmem.at[rows, columns])


class Codes(NamedTuple):
    """What `quantize_rows` makes of y [M, N] bfloat16: codes, and scales [M, N/128] as they are stored.

    A consumer has the 128 columns of a scale, a row's in four lanes.
    """

    cut: Cut
    form: QuantFormat

    def outputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        m, n = self.cut.m, self.cut.n
        scale = jax.ShapeDtypeStruct((m, n // BLOCK), jnp.uint8 if self.form.scale == "ue8m0" else jnp.float32)
        return jax.ShapeDtypeStruct((m, n), self.form.values_dtype), scale

    def scratch(self) -> dict[str, Any]:
        return {"y": plgpu.SMEM((CONSUMERS, WGMMA_ROWS, BLOCK), self.form.values_dtype, transforms=swizzled(1))}

    def write(self, y: jax.Array, rows: Any, first_column: Any, warpgroup: Any, outs: Any, scratch: Any) -> None:
        (codes_gmem, scale_gmem), y_smem = outs, scratch["y"]
        rounded = y.astype(jnp.bfloat16).astype(jnp.float32)
        codes, scale = quantized(rounded, self.form, plgpu.Layout.WGMMA)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        store_narrow(y_smem, warpgroup, codes)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_smem.at[warpgroup], codes_gmem.at[rows, pl.ds(first_column, BLOCK)])
        store_narrow(scale_gmem, (rows, lax.div(first_column, BLOCK)), scale)

"""Cached rows on their way to the L2 cache, a bulk prefetch each: nobody waits, and no register or memory is taken.

The scales of a row, which lie elsewhere, are one cache line.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.mosaic.addresses import constant
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.sparse_attention.gather_sm90 import Parts, prefetch_row
from pallas_kernels.sparse_attention.many import gather_sm90 as gather


def prefetch_rows(arrays_gmem: tuple[Any, ...], parts: Parts, page: jax.Array, row: jax.Array) -> None:
    """Asks for rows page[i], row[i] as far as the L2 cache; for those that are not seen (row -1) not."""
    if is_interpreted():
        return

    @plgpu.inline_mgpu(arg_types=(tuple(plgpu.RefType() for _ in arrays_gmem), gather.EACH_ROW, gather.EACH_ROW))
    def prefetch(_ctx: Any, arrays: tuple[ir.Value, ...], pages: Any, rows: Any) -> None:
        lane = arith.andi(utils.thread_idx(), constant(gather.LANES - 1))
        for page, row in gather.held(pages, rows):
            prefetch_row(arrays, parts, page, row, lane)

    prefetch(arrays_gmem, page, row)

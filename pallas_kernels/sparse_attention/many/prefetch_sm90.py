"""Cached rows on their way to the L2 cache, a bulk prefetch each: nobody waits, and no register or memory is taken.

The scales of a row, which lie elsewhere, are one cache line.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.mosaic.addresses import behind, constant, i32
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.sparse_attention.gather_sm90 import Parts, start_of
from pallas_kernels.sparse_attention.many import gather_sm90 as gather


def prefetch_rows(arrays_gmem: tuple[Any, ...], parts: Parts, page: jax.Array, row: jax.Array) -> None:
    """Asks for rows page[i], row[i] as far as the L2 cache; for those that are not seen (row -1) not."""
    if is_interpreted():
        return

    @plgpu.inline_mgpu(arg_types=(tuple(plgpu.RefType() for _ in arrays_gmem), gather.EACH_ROW, gather.EACH_ROW))
    def prefetch(_ctx: Any, arrays: tuple[ir.Value, ...], pages: Any, rows: Any) -> None:
        lane = arith.andi(utils.thread_idx(), constant(gather.LANES - 1))
        for page, row in gather.held(pages, rows):
            _prefetch_row(arrays, parts, page, row, lane)

    prefetch(arrays_gmem, page, row)


def _prefetch_row(arrays: tuple[ir.Value, ...], parts: Parts, page: ir.Value, row: ir.Value, lane: ir.Value) -> None:
    """Each lane of a row asks for a piece of its own."""
    bulk = "cp.async.bulk.prefetch.L2.global [$0], {};"
    pieces = [(parts.tail, bulk.format(parts.tail.size))]
    if parts.codes is not None and parts.scale is not None:
        size = parts.codes.size + parts.tail.size
        if replace(parts.codes, begin=parts.codes.begin + parts.codes.size, size=parts.tail.size) == parts.tail:
            pieces = [(parts.codes, bulk.format(size))]  # one behind the other
        else:
            pieces.append((parts.codes, bulk.format(parts.codes.size)))
        pieces.append((parts.scale, "prefetch.global.L2 [$0];"))
    seen = arith.cmpi(arith.CmpIPredicate.sge, row, constant(0))
    for i, (part, instruction) in enumerate(pieces):
        here = arith.andi(seen, arith.cmpi(arith.CmpIPredicate.eq, lane, constant(i)))
        ask = f"{{ .reg .pred p; setp.ne.b32 p, $1, 0; @p {instruction} }}"
        address = behind(start_of(arrays, part, page, row), part.begin)
        operands = [address, arith.extui(i32(), here)]
        llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, ask, "l,r", has_side_effects=True)

"""What the Hopper matmul kernels share: the producer's loop over buffers, their layout, and scales of finished sums."""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax

from pallas_kernels.block_matmul.tiling import PRODUCER_REGISTERS

BLOCK = 128  # of K, and rows of a weight scale
WGMMA_ROWS = 64
ROWS = plgpu.Layout.WGMMA.reduce(1)  # of a vector with one element a row of an accumulator
COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # and a column


def produce(
    loop: dict[str, Any],
    steps: int,
    stages: int,
    free: Any,
    copy: Callable[..., None],
    found: Callable[[Any], Any] = lambda info: info,
    end: Callable[[Any], None] | None = None,
) -> None:
    """The producer's part: `copy(found(info), i, slot)` for every step i of every tile of `loop`, as buffers come free.

    found: what a tile looks up in device memory; in a step, copies would wait for it. end: called with the slot behind
    those of the last step, for consumers that wait for a buffer more than there are. It ends when the buffers of the
    last steps are read: every phase of a barrier that completes is observed.
    """
    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

    def claim(step):
        slot = lax.rem(step, stages)
        pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
        return slot

    @plgpu.nd_loop(**loop)
    def total(info, carry):
        of_tile = found(info)

        @pl.loop(0, steps)
        def _step(i):
            copy(of_tile, i, claim(carry + i))

        return carry + steps

    if end is not None:
        end(claim(total))
        total += 1

    @pl.loop(0, stages - (end is not None))
    def _wait(i):
        step = total - stages + i
        pl.when(step >= 0)(lambda: plgpu.barrier_wait(free.at[lax.rem(step, stages)]))


def scaled(sums: jax.Array, of_rows_gmem: Any, of_columns_gmem: Any) -> jax.Array:
    """sums [rows, columns] of an accumulator, times float32 scales [rows] and [columns] from device memory.

    The product of the two first: who multiplies the transposed matrices gets the same bits.
    """
    sides = ((of_rows_gmem, ROWS), (of_columns_gmem, COLUMNS))
    of_rows, of_columns = (plgpu.load(gmem, layout=layout, optimized=False) for gmem, layout in sides)
    scale = lax.broadcast_in_dim(of_rows, sums.shape, [0]) * lax.broadcast_in_dim(of_columns, sums.shape, [1])
    return sums * scale


def swizzled(itemsize: int, columns: int = 128) -> tuple[Any, ...]:
    """Shared-memory layout of a tile that wgmma or TMA reads: the swizzle is over rows of up to 128 bytes."""
    width = min(128, itemsize * columns)
    return plgpu.TilingTransform((8, width // itemsize)), plgpu.SwizzleTransform(width)

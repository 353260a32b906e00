"""Channels of a part's output, between the kernel that makes it and the launch that adds parts.

A thread has neighbours of a row by twos in an accumulator. In memory those of sixteen channels lie together, so that it
stores four at once and half as many lines are touched: channel 16 k + 8 h + 2 q + e lies at 16 k + 4 q + 2 h + e.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from pallas_kernels.mosaic.addresses import fragmented
from pallas_kernels.mosaic.interpreter import is_interpreted

GROUP = 16  # channels that lie together
CHANNELS = 256  # that a warpgroup adds at once, two a thread
# An accumulator's rows, of which four lanes have four neighbours each.
_STORED = plgpu.Layout.TILED(plgpu.Tiling(((64, GROUP), (16, GROUP), (8, GROUP), (4,))), (-7,), (-3, -2), -1)
ADDED = plgpu.Layout.WG_STRIDED((CHANNELS,), vec_size=2)  # as parts are loaded and added
# The same registers as channels: a warp has four groups, a lane a pair of one.
IN_ORDER = plgpu.Layout.TILED(plgpu.Tiling(((CHANNELS,), (4 * GROUP,), (GROUP,), (8,), (2,))), (-5,), (-4, -2, -3), -1)


def stored(x: jax.Array) -> jax.Array:
    """float32 x [64, channels], an accumulator, in the order in which it lies in memory."""
    rows, channels = x.shape
    if is_interpreted():
        groups = x.reshape(rows, channels // GROUP, 2, 4, 2)
        return groups.transpose(0, 1, 3, 2, 4).reshape(x.shape)
    found = plgpu.ShapeDtypeStruct(x.shape, jnp.dtype(jnp.float32), layout=_STORED)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=found)
    def rename(_ctx: Any, x: Any) -> Any:
        pairs = x.registers.reshape(channels // GROUP, 2, 2)  # of each group both eights, and of these both rows
        four = ir.VectorType.get((4,), ir.F32Type.get())
        registers = np.empty((channels // GROUP, 2), dtype=object)
        for group, row in np.ndindex(registers.shape):
            values = [vector.extract(pairs[group, eight, row], [], [i]) for eight in range(2) for i in range(2)]
            registers[group, row] = vector.from_elements(four, values)
        return fragmented(registers.reshape(_STORED.to_mgpu().registers_shape((rows, channels))), _STORED, None)

    return rename(x)


def in_order(x: jax.Array) -> jax.Array:
    """float32 x [CHANNELS] in `ADDED` as it lay in memory, with channels in order, in `IN_ORDER`."""
    if is_interpreted():
        return x.reshape(-1, 4, 2, 2).transpose(0, 2, 1, 3).reshape(x.shape)
    found = plgpu.ShapeDtypeStruct(x.shape, jnp.dtype(jnp.float32), layout=IN_ORDER)

    @plgpu.inline_mgpu(arg_types=(ADDED,), return_type=found)
    def rename(_ctx: Any, x: Any) -> Any:
        return fragmented(x.registers.reshape(IN_ORDER.to_mgpu().registers_shape(x.shape)), IN_ORDER, None)

    return rename(x)

"""wgmma into accumulators that start at zero, in Mosaic; for the interpreter, Pallas's own.

Pallas's accumulators are zeros that LLVM moves out of loops; where ptxas then no longer sees that they are zeros, it
copies them, one instruction a register, and for two products behind one another keeps two sets of registers. Here the
zeros are made where they are used, and cost nothing: the first wgmma ignores what it finds.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportAbstractUsage=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.fragmented_array import optimization_barrier
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import nvvm, vector

from pallas_kernels.mosaic.interpreter import is_interpreted

LAYOUT = plgpu.Layout.WGMMA
SWIZZLE = 128


def start(a: Any, b: Any) -> jax.Array:
    """float32 a [64, k] . b [n, k] of codes in shared memory, swizzled by 128 bytes; to be read behind `wait`."""
    shape = (a.shape[0], b.shape[0])
    if is_interpreted():

        def multiply(accumulator):
            plgpu.wgmma(accumulator, a, b.T)
            return accumulator[...]

        return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
    swizzled = plgpu.RefType((plgpu.TilingTransform((8, SWIZZLE)), plgpu.SwizzleTransform(SWIZZLE)))

    @plgpu.inline_mgpu(
        arg_types=(swizzled, swizzled), return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=LAYOUT)
    )
    def run(_ctx: Any, a: ir.Value, b: ir.Value) -> mgpu.FragmentedArray:
        accumulator = mgpu.WGMMAAccumulator.from_registers(_zeros(shape))
        accumulator = mgpu.wgmma(accumulator, a, mgpu.memref_transpose(b, (1, 0, 3, 2)), swizzle=SWIZZLE)
        nvvm.wgmma_commit_group_sync_aligned()
        return accumulator.value

    return run(a, b)


def wait(products: Sequence[jax.Array], left: int) -> list[jax.Array]:
    """The products of one start, when no more than `left` that were started later are on their way."""
    if is_interpreted():
        return list(products)
    found = tuple(plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=LAYOUT) for x in products)

    @plgpu.inline_mgpu(arg_types=(LAYOUT,) * len(products), return_type=found)
    def run(_ctx: Any, *products: mgpu.FragmentedArray) -> tuple[mgpu.FragmentedArray, ...]:
        nvvm.wgmma_wait_group_sync_aligned(left)
        arrived: Any = optimization_barrier(*products)
        return (arrived,) if len(products) == 1 else tuple(arrived)

    arrived: Any = run(*products)
    return list(arrived)


def _zeros(shape: tuple[int, int]) -> mgpu.FragmentedArray:
    layout, real = LAYOUT.to_mgpu(), ir.F32Type.get()
    registers = np.empty(layout.registers_shape(shape), dtype=object)
    for at in np.ndindex(*registers.shape):
        pair = [utils.inline_ptx("mov.b32 $0, 0;", result_types=real, has_side_effects=True) for _ in range(2)]
        registers[at] = vector.from_elements(ir.VectorType.get((2,), real), pair)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

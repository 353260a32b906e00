"""Vectors of indices looked up in either memory, one element or four neighbours at a time; interpreted, in jnp."""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.top_k.warpgroup import each_scalar, in_lanes


def look_up(ref: Any, index: jax.Array) -> jax.Array:
    """ref[index], of a vector in either memory."""
    if is_interpreted():
        return ref[...][index]
    layout = in_lanes(*index.shape)
    found = plgpu.ShapeDtypeStruct(index.shape, ref.dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout), return_type=found)
    def run(_ctx: Any, ref: Any, index: Any) -> Any:
        registers = np.empty_like(index.registers)
        base, element = utils.memref_ptr(ref), ir.MemRefType(ref.type).element_type
        for at, i in each_scalar(index):
            address = utils.getelementptr(base, [i], element)
            registers[at] = llvm.load(ir.VectorType.get((1,), element), address, alignment=4)
        signed = utils.is_signed(found.dtype)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=signed)

    return run(ref, index)


def look_up_four(ref: Any, index: jax.Array) -> tuple[jax.Array, ...]:
    """ref[index + i], i = 0 ... 3, of a vector in memory, for indices that are multiples of four."""
    if is_interpreted():
        return tuple(ref[...][index + i] for i in range(4))
    layout = in_lanes(*index.shape)
    found = plgpu.ShapeDtypeStruct(index.shape, ref.dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout), return_type=(found,) * 4)
    def run(_ctx: Any, ref: Any, index: Any) -> Any:
        registers = [np.empty_like(index.registers) for _ in range(4)]
        base, element = utils.memref_ptr(ref), ir.MemRefType(ref.type).element_type
        one, four = (ir.VectorType.get((size,), element) for size in (1, 4))
        for at, i in each_scalar(index):
            values = llvm.load(four, utils.getelementptr(base, [i], element), alignment=16)
            for j in range(4):
                registers[j][at] = vector.broadcast(one, vector.extract(values, [], [j]))
        signed = utils.is_signed(found.dtype)
        return tuple(mgpu.FragmentedArray(_registers=x, _layout=layout.to_mgpu(), _is_signed=signed) for x in registers)

    return run(ref, index)

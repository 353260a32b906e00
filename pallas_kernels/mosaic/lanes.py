"""Elements that trade places with others of their row, in registers and between lanes; for the interpreter, in jnp."""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir.dialects import vector

from pallas_kernels.mosaic.interpreter import is_interpreted


def exchanged(x: jax.Array, distance: int, layout: Any) -> jax.Array:
    """y[.., c] = x[.., c ^ distance] of float32 x [columns] or [rows, columns]; distance is a power of two.

    layout: rows as tiles whose last two axes are lanes and a thread's neighbours. Where `distance` is at least as many
    columns as a thread holds side by side, a row must lie in the lanes of one warp.
    """
    if is_interpreted():
        pairs = x.reshape(*x.shape[:-1], -1, 2, distance)
        return jnp.flip(pairs, -2).reshape(x.shape)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout))
    def run(_ctx: Any, x: Any) -> Any:
        registers = np.empty_like(x.registers)
        for at, register in np.ndenumerate(x.registers):
            size = register.type.shape[0]
            values = [vector.extract(register, [], [i]) for i in range(size)]
            if distance < size:
                moved = [values[i ^ distance] for i in range(size)]
            else:
                moved = [utils.shfl_bfly(value, distance // size) for value in values]
            registers[at] = vector.from_elements(register.type, moved)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None)

    return run(x)


def hadamard(x: jax.Array, layout: Any) -> jax.Array:
    """Every row of float32 x [rows, columns] times the Hadamard matrix of its width, a power of two."""
    width = x.shape[1]
    column = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=layout)
    distance = 1
    while distance < width:
        other = exchanged(x, distance, layout)
        x = other + jnp.where((column & distance) == 0, x, -x)
        distance *= 2
    return x * width**-0.5

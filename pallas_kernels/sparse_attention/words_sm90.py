"""Words of cached rows to numbers, and powers of two: what both conversions to float16 share, on Hopper."""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import math
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from pallas_kernels.mosaic.addresses import fragmented, i32
from pallas_kernels.sparse_attention.held_sm90 import TILE

LOG2_E = math.log2(math.e)
LARGEST = 15  # log2 of the largest weight
HEADROOM = 7  # 448, the largest code, times 2^7 is within float16
LEAST = 127 - 40  # of a row's power of two
Q_LARGEST = 14  # log2 of the largest channel of q, or less than one below
Q_LEAST = 127 - 60  # of a head's power of two


def exponent_of(x: jax.Array) -> jax.Array:
    """127 + floor(log2(x)) of bfloat16 x >= 0, as int32."""
    return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) >> 23


def power(exponent: jax.Array) -> jax.Array:
    """float32 2^(exponent - 127), for exponents from 1 to 254."""
    return lax.bitcast_convert_type(exponent << 23, jnp.float32)


def across(x: jax.Array, layout: Any) -> jax.Array:
    """x [rows] for each of TILE channels."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (*x.shape, TILE), [0]), layout)


def scale_code(words: tuple[jax.Array, ...], tile: int) -> jax.Array:
    """The UE8M0 code of a tile's scale, int32 [rows], of the words that hold them."""
    word, byte = words[tile // 4], tile % 4
    return lax.shift_right_logical(word, jnp.full_like(word, 8 * byte)) & 255


def reinterpreted(words: jax.Array, dtype: Any, held: Any, layout: Any) -> jax.Array:
    """The words of a lane as the neighbours of type `dtype` that they hold; registers stay as they are."""
    found = plgpu.ShapeDtypeStruct((len(words), TILE), jnp.dtype(dtype), layout=layout)
    length = 8  # of a register

    @plgpu.inline_mgpu(arg_types=(held,), return_type=found)
    def reinterpret(_ctx: Any, held: Any) -> Any:
        kind = ir.VectorType.get((length,), utils.dtype_to_ir_type(jnp.dtype(dtype)))
        each = length * jnp.dtype(dtype).itemsize // 4  # words of a register
        registers = []
        for register in held.registers.flat:
            for first in range(0, 4, each):
                part = vector.extract_strided_slice(ir.VectorType.get((each,), i32()), register, [first], [each], [1])
                registers.append(vector.bitcast(kind, part))
        shape = layout.to_mgpu().registers_shape((len(words), TILE))
        return fragmented(np.array(registers, dtype=object).reshape(shape), layout, None)

    return reinterpret(words)

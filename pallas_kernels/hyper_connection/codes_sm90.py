"""A sub-layer's input as codes, from the registers in which it is made, on Hopper."""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu

from pallas_kernels.formats import QuantFormat
from pallas_kernels.hyper_connection.tiling import CHUNK, FINISHERS
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.launch import store_narrow
from pallas_kernels.quant.tensor import QuantTensor
from pallas_kernels.quantize_rows.kernel_sm90 import quantized, registers

UNIT = 4 * CHUNK  # columns of a finisher: fewer are not held once and group by group


def out_types(tokens: int, width: int, form: QuantFormat) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of codes and of their scales as they are stored."""
    return (
        jax.ShapeDtypeStruct((tokens, width // CHUNK, CHUNK), form.values_dtype),
        jax.ShapeDtypeStruct((tokens, width // CHUNK), jnp.uint8 if form.scale == "ue8m0" else jnp.float32),
    )


def takes(width: int) -> bool:
    """Whether finishers quantise what they have of streams so wide."""
    return width % (FINISHERS * UNIT) == 0


def store(codes_gmem: Any, scale_gmem: Any, token: jax.Array, finisher: jax.Array, x: jax.Array, form: Any) -> None:
    """The codes of bfloat16 x [columns], a finisher's part of a token, and their scales."""
    groups = x.shape[0] // CHUNK
    codes, scale = quantized(in_groups(x.astype(jnp.float32)), form, registers(groups))
    here = pl.ds(finisher * groups, groups)
    store_narrow(codes_gmem, (token, here), codes)
    store_narrow(scale_gmem, (token, here), scale)


def in_groups(x: jax.Array) -> jax.Array:
    """float32 x [columns] as [columns / 128, 128]: in the registers that have it."""
    shape = x.shape[0] // CHUNK, CHUNK
    if is_interpreted():
        return x.reshape(shape)
    layout = registers(shape[0])
    found = plgpu.ShapeDtypeStruct(shape, x.dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(neighbours(x.shape[0]),), return_type=found)
    def relabel(_ctx: Any, x: Any) -> Any:
        held = layout.to_mgpu()
        return mgpu.FragmentedArray(
            _registers=x.registers.reshape(held.registers_shape(shape)), _layout=held, _is_signed=None
        )

    return relabel(x)


def neighbours(columns: int) -> Any:
    """How a warpgroup holds [columns]: up to eight neighbours a thread."""
    each = math.gcd(columns // 128, 8)
    return plgpu.Layout.TILED(plgpu.Tiling(((128 * each,), (32 * each,), (each,))), (-3,), (-2,), -1)


def of_rows(codes: jax.Array, scale: jax.Array, form: QuantFormat) -> QuantTensor:
    """[m, D] of what `store` has stored."""
    if form.scale == "ue8m0":
        scale = lax.bitcast_convert_type(scale, jnp.float8_e8m0fnu)
    return QuantTensor(codes.reshape(codes.shape[0], -1), scale, form)

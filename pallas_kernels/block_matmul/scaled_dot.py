"""One dot product of the codes, scales applied to its result: XLA's FP8 and INT8 matrix units.

Takes scales that do not vary along the contracted axis: x one a token (or one in all), w one a channel (or one in all).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import device
from pallas_kernels.formats import QuantFormat
from pallas_kernels.quant.tensor import QuantTensor
from pallas_kernels.quant.weights import TreatedWeight, quantize_input


def unsupported_reason(
    x: jax.Array, w: Any, *, activations: QuantFormat | None = None, out_dtype: DTypeLike | None = None
) -> str | None:
    del x, out_dtype
    if isinstance(w, TreatedWeight):
        if w.rotated or w.channels is not None:
            return "rotated or isolated channels"
        w = w.weight
    if not isinstance(w, QuantTensor):
        return "the weight is not quantised"
    if activations is None:
        return "activations are not quantised"
    return formats_unsupported_reason(activations, w.format)


def formats_unsupported_reason(activations: QuantFormat, weight: QuantFormat) -> str | None:
    """Why operands of these formats cannot be multiplied code by code on the current device."""
    for what, form in (("activations", activations), ("weights", weight)):
        if form.tile[1] is not None:
            return f"scales of {what} in {form.name} vary along the contracted axis, XLA's dot has one for all of it"
    elements = {activations.element, weight.element}
    here = device.current()
    if elements == {"int8"}:
        return None if here.has_int8 else f"{here.name} has no INT8 matrix units that XLA uses"
    if elements <= {"e4m3", "e5m2"}:
        if elements == {"e5m2"}:
            return "E5M2 x E5M2 is no tensor core instruction"
        return None if here.has_fp8 else f"{here.name} has no FP8 matrix units"
    return f"{activations.element} x {weight.element} is no matrix unit's product"


def matmul(
    x: jax.Array, w: Any, *, activations: QuantFormat | None = None, out_dtype: DTypeLike | None = None
) -> jax.Array:
    assert activations is not None
    weight, static = (w.weight, w.input_scale) if isinstance(w, TreatedWeight) else (w, None)
    codes = quantize_input(x, activations, static)
    accumulator = jnp.int32 if activations.element == "int8" else jnp.float32
    contract_last = (((1,), (1,)), ((), ()))
    y = jax.lax.dot_general(codes.values, weight.values, contract_last, preferred_element_type=accumulator)
    scales = codes.scale.astype(jnp.float32), weight.scale.astype(jnp.float32).T
    y = y.astype(jnp.float32) * scales[0] * scales[1]
    return y.reshape(*x.shape[:-1], -1).astype(out_dtype or x.dtype)

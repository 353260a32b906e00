"""Products with quantised weights: which codes XLA multiplies on a device's units, and what is done elsewhere."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import device
from pallas_kernels.formats import QuantFormat
from pallas_kernels.quant.tensor import QuantTensor
from pallas_kernels.quant.weights import TreatedWeight, dense_array, fitted

FLOAT8 = ("e4m3", "e5m2")
_TRITON = "--xla_gpu_enable_triton_gemm"
# What makes XLA take cuBLAS for INT8 products on GPUs. Its own kernels, by Triton, give wrong sums (jax 0.11.2, an
# H100 and H200s): all of them without autotuning, some with it, as it tries wrong ones besides right ones.
NO_TRITON = f"{_TRITON}=false"


def operands_unsupported_reason(w: Any, activations: QuantFormat | None) -> str | None:
    """Why `x @ w.T`, x rounded to `activations`, is no product of codes on the current device."""
    if not isinstance(stored(w), QuantTensor):
        return "the weight is not quantised"
    if activations is None:
        return "activations are not quantised"
    return _elements_unsupported_reason(activations.element, stored(w).format.element)


def _elements_unsupported_reason(x: str, w: str) -> str | None:
    here = device.current()
    if "e2m1" in (x, w):
        return "XLA's dot takes no e2m1 codes packed two a byte"
    if x == w == "int8":
        if here.has_int8 and here.platform == "gpu" and not _by_cublas():
            return f"XLA's own INT8 products are wrong on GPUs: add {NO_TRITON} to XLA_FLAGS, for those of cuBLAS"
        return None if here.has_int8 else f"{here.name} has no INT8 matrix units that XLA uses"
    if x not in FLOAT8 or w not in FLOAT8:
        return f"no matrix unit multiplies {x} by {w}"
    if not here.has_fp8:
        return f"{here.name} has no FP8 matrix units"
    return "cuBLAS multiplies no e5m2 by e5m2" if x == w == "e5m2" else None


def _by_cublas() -> bool:
    """Whether XLA_FLAGS has NO_TRITON; of several values the last one counts."""
    flags = (flag.partition("=") for flag in os.environ.get("XLA_FLAGS", "").split())
    values = [value.lower() for name, _, value in flags if name == _TRITON]
    return bool(values) and values[-1] in ("false", "0")


def one_scale_unsupported_reason(columns: int, w: Any, activations: QuantFormat) -> str | None:
    """Why the scales of x [..., columns] or of w vary along the contracted axis: one dot needs one for all of it."""
    for what, form in (("weights", stored(w).format), ("activations", input_format(w, columns, activations))):
        if form.tile[1] is not None:
            return f"the scales of {form.name} {what} vary along the contracted axis"
    return None


def stored(w: Any) -> Any:
    """The quantised tensor inside a treated weight."""
    return w.weight if isinstance(w, TreatedWeight) else w


def static_scale(w: Any) -> Any:
    return w.input_scale if isinstance(w, TreatedWeight) else None


def input_format(w: Any, columns: int, activations: QuantFormat) -> QuantFormat:
    """The format that `quantize_input` gives x [..., columns]: a static scale is one for all of it."""
    if static_scale(w) is not None:
        return QuantFormat(activations.element, (None, None), activations.scale)
    return fitted(activations, columns)


def asked_of_dot(codes: Any) -> dict[str, Any]:
    """Keywords of `dot_general` for a product of `codes`: exact int32 sums, or float32 ones.

    "highest", because by default XLA lets Hopper's FP8 units keep partial sums of 14 bits or so along all of K.
    """
    if codes.dtype == jnp.int8:
        return {"preferred_element_type": jnp.int32}
    return {"preferred_element_type": jnp.float32, "precision": "highest"}


def dequantized_after(x: jax.Array, w: Any, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """(x, w as an array of `dtype`), a quantised w being dequantised once x is there and not before.

    Weights depend on nothing: without the barrier XLA may dequantise those of every layer when a program starts, and
    its CPU scheduler does.
    """
    if isinstance(w, QuantTensor):
        x, w = jax.lax.optimization_barrier((x, w))
    return x, dense_array(w, dtype)

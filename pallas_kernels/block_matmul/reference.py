"""The definition: dequantise, multiply, accumulate in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.formats import QuantFormat
from pallas_kernels.products import dequantized_after
from pallas_kernels.quant.weights import TreatedWeight, treat


def matmul(
    x: jax.Array, w: Any, *, activations: QuantFormat | None = None, out_dtype: DTypeLike | None = None
) -> jax.Array:
    dtype = x.dtype
    x, weight, kept = treat(x, w, activations)
    exact = precision(dtype, out_dtype)
    y = times(*dequantized_after(x, weight, dtype), exact)
    if kept is not None:
        assert isinstance(w, TreatedWeight)
        y = y + times(kept, w.columns.astype(dtype), exact)
    return y.astype(out_dtype or dtype)


def block_diagonal_matmul(x: jax.Array, w: Any) -> jax.Array:
    x, weight, kept = treat(x, w, None)
    *rows, groups, _ = x.shape
    y = _times_groups(*dequantized_after(x, weight, x.dtype))
    if kept is not None:
        y = y + _times_groups(kept, w.columns.astype(x.dtype))
    return y.astype(x.dtype).reshape(*rows, -1)


def precision(dtype: DTypeLike, out_dtype: DTypeLike | None) -> str | None:
    """float32 operands mean a layer that the released code keeps in float32: never TF32, never bf16 passes."""
    return "highest" if dtype == jnp.float32 and out_dtype == jnp.float32 else None


def times(x: jax.Array, w: jax.Array, precision: str | None) -> jax.Array:
    """x [..., I] times w [O, I] transposed, in float32."""
    contract_last = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w, contract_last, precision=precision, preferred_element_type=jnp.float32)


def _times_groups(x: jax.Array, w: jax.Array) -> jax.Array:
    weight = w.reshape(x.shape[-2], -1, x.shape[-1])
    return jnp.einsum("...gi,goi->...go", x, weight, preferred_element_type=jnp.float32)

"""The definition: dequantise, multiply, accumulate in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.quant import QuantTensor, dequantize


def matmul(x: jax.Array, w: jax.Array | QuantTensor, *, out_dtype: DTypeLike | None = None) -> jax.Array:
    weight = dequantize(w, x.dtype) if isinstance(w, QuantTensor) else w.astype(x.dtype)
    contract_last = (((x.ndim - 1,), (1,)), ((), ()))
    # float32 operands mean a layer that the released code keeps in float32: never TF32, never bf16 passes.
    exact = "highest" if x.dtype == jnp.float32 and out_dtype == jnp.float32 else None
    y = jax.lax.dot_general(x, weight, contract_last, precision=exact, preferred_element_type=jnp.float32)
    return y.astype(out_dtype or x.dtype)


def block_diagonal_matmul(x: jax.Array, w: jax.Array | QuantTensor) -> jax.Array:
    weight = dequantize(w, x.dtype) if isinstance(w, QuantTensor) else w.astype(x.dtype)
    *rows, groups, into = x.shape
    weight = weight.reshape(groups, -1, into)
    y = jnp.einsum("...gi,goi->...go", x, weight, preferred_element_type=jnp.float32)
    return y.astype(x.dtype).reshape(*rows, -1)

"""One dot product of the codes, scales applied to its result: XLA's FP8 and INT8 matrix units.

Takes scales that do not vary along the contracted axis: x one a token (or one in all), w one a channel (or one in all).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.block_matmul.codes import ORDER, multiply
from pallas_kernels.formats import QuantFormat
from pallas_kernels.products import asked_of_dot, one_scale_unsupported_reason, operands_unsupported_reason
from pallas_kernels.quant.tensor import QuantTensor


def unsupported_reason(
    x: jax.Array,
    w: Any,
    *,
    activations: QuantFormat | None = None,
    codes: QuantTensor | None = None,
    out_dtype: DTypeLike | None = None,
    batch_invariant: bool = False,
) -> str | None:
    del codes, out_dtype
    if batch_invariant:
        return ORDER
    if reason := operands_unsupported_reason(w, activations):
        return reason
    assert activations is not None
    return one_scale_unsupported_reason(x.shape[-1], w, activations)


def matmul(
    x: jax.Array,
    w: Any,
    *,
    activations: QuantFormat | None = None,
    codes: QuantTensor | None = None,
    out_dtype: DTypeLike | None = None,
    batch_invariant: bool = False,
) -> jax.Array:
    assert not batch_invariant, "unsupported_reason refuses it"
    return multiply(product, x, w, activations, codes, out_dtype)


def product(x: QuantTensor, w: QuantTensor) -> jax.Array:
    contract_last = (((1,), (1,)), ((), ()))
    y = jax.lax.dot_general(x.values, w.values, contract_last, **asked_of_dot(x.values))
    # x [rows or 1, 1], w [O or 1, 1]
    return y.astype(jnp.float32) * x.scale.astype(jnp.float32) * w.scale.astype(jnp.float32).T

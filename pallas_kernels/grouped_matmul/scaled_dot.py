"""Products of codes, scales applied to their results: XLA's FP8 and INT8 matrix units for experts.

Takes scales that do not vary along the contracted axis, as the dense `scaled_dot`. Few rows gather the codes of their
experts, many go through the ragged dot, like the reference.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_matmul.codes import ORDER
from pallas_kernels.formats import QuantFormat
from pallas_kernels.grouped_matmul import layer
from pallas_kernels.grouped_matmul.gradient import OBSERVED, with_gradient
from pallas_kernels.grouped_matmul.reference import RAGGED, times
from pallas_kernels.products import (
    asked_of_dot,
    one_scale_unsupported_reason,
    operands_unsupported_reason,
    static_scale,
)
from pallas_kernels.quant.tensor import QuantTensor
from pallas_kernels.quant.weights import ObservedWeight, TreatedWeight, quantize_input, treat
from pallas_kernels.router import Routing


def experts(
    x: jax.Array,
    w1: Any,
    w3: Any,
    w2: Any,
    routing: Routing,
    *,
    limit: float,
    activations: QuantFormat | None = None,
    batch_invariant: bool = False,
) -> jax.Array:
    assert not batch_invariant, "unsupported_reason refuses it"
    run = functools.partial(_experts, activations=activations)
    return with_gradient(run, x, w1, w3, w2, routing, limit=limit)


def _experts(
    x: jax.Array, w1: Any, w3: Any, w2: Any, routing: Routing, *, limit: float, activations: QuantFormat | None
) -> jax.Array:
    return layer.experts(grouped_matmul, x, w1, w3, w2, routing, limit, activations)


def unsupported_reason(
    x: jax.Array,
    w1: Any,
    w3: Any,
    w2: Any,
    routing: Routing,
    *,
    limit: float,
    activations: QuantFormat | None = None,
    batch_invariant: bool = False,
) -> str | None:
    """Of any of the three products: the weights may be stored differently."""
    del routing, limit
    if batch_invariant:
        return ORDER
    if isinstance(w2, ObservedWeight):
        return OBSERVED
    columns = x.shape[-1], x.shape[-1], w2.shape[-1]
    reasons = (_unsupported_reason(k, w, activations) for k, w in zip(columns, (w1, w3, w2), strict=True))
    return next((reason for reason in reasons if reason), None)


def _unsupported_reason(columns: int, w: Any, activations: QuantFormat | None) -> str | None:
    if reason := operands_unsupported_reason(w, activations):
        return reason
    assert activations is not None
    return one_scale_unsupported_reason(columns, w, activations)


def grouped_matmul(x: jax.Array, w: Any, counts: jax.Array, activations: QuantFormat | None = None) -> jax.Array:
    """As the reference's, by products of codes; in x's dtype."""
    assert activations is not None, "unsupported_reason refuses inputs that stay unrounded"
    treated, weight, kept = treat(x, w, None)
    y = _times(quantize_input(treated, activations, static_scale(w)), weight, counts)
    if kept is not None:
        assert isinstance(w, TreatedWeight)
        y = y + times(kept, w.columns, counts)
    return y.astype(x.dtype)


def _times(x: QuantTensor, w: QuantTensor, counts: jax.Array) -> jax.Array:
    rows, experts = x.shape[0], counts.shape[0]
    expert, how = layer.expert_of_row(counts, rows), asked_of_dot(x.values)
    if rows <= experts:
        y = jnp.einsum("ni,noi->no", x.values, w.values[expert], **how)
    else:
        y = jax.lax.ragged_dot_general(x.values, w.values, counts, RAGGED, **how)
    # x [N or 1, 1], w [E, O or 1, 1]
    return y.astype(jnp.float32) * x.scale.astype(jnp.float32) * w.scale[expert, :, 0].astype(jnp.float32)

"""Products of codes, scales applied to their results: XLA's FP8 and INT8 matrix units for experts.

Takes scales that do not vary along the contracted axis, as the dense `scaled_dot`. Few rows gather the codes of their
experts, many go through the ragged dot, like the reference.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.formats import QuantFormat
from pallas_kernels.grouped_matmul import layer
from pallas_kernels.grouped_matmul.reference import RAGGED, times
from pallas_kernels.products import (
    asked_of_dot,
    one_scale_unsupported_reason,
    operands_unsupported_reason,
    static_scale,
)
from pallas_kernels.quant.tensor import QuantTensor
from pallas_kernels.quant.weights import TreatedWeight, quantize_input, treat
from pallas_kernels.router import Routing


def expert_gate_up(
    x: jax.Array, w1: Any, w3: Any, routing: Routing, *, limit: float, activations: QuantFormat | None = None
) -> jax.Array:
    return layer.gate_up(grouped_matmul, x, w1, w3, routing, limit, activations)


def expert_down(hidden: jax.Array, w2: Any, routing: Routing, *, activations: QuantFormat | None = None) -> jax.Array:
    return layer.down(grouped_matmul, hidden, w2, routing, activations)


def gate_up_unsupported_reason(
    x: jax.Array, w1: Any, w3: Any, routing: Routing, *, limit: float, activations: QuantFormat | None = None
) -> str | None:
    del routing, limit
    return _unsupported_reason(x, w1, activations) or _unsupported_reason(x, w3, activations)


def down_unsupported_reason(
    hidden: jax.Array, w2: Any, routing: Routing, *, activations: QuantFormat | None = None
) -> str | None:
    del routing
    return _unsupported_reason(hidden, w2, activations)


def _unsupported_reason(x: jax.Array, w: Any, activations: QuantFormat | None) -> str | None:
    if reason := operands_unsupported_reason(w, activations):
        return reason
    assert activations is not None
    return one_scale_unsupported_reason(x.shape[-1], w, activations)


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

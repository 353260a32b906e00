"""The definition. Few rows gather their experts' weights; many rows go through XLA's ragged dot."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.formats import QuantFormat
from pallas_kernels.quant.weights import TreatedWeight, dense_array, treat
from pallas_kernels.router import Routing
from pallas_kernels.swiglu import swiglu

# x [N, I] . w [E, O, I] over I, ragged over N: the [out, in] twin of jax.lax.ragged_dot.
_RAGGED = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)


def grouped_matmul(x: jax.Array, w: Any, counts: jax.Array, activations: QuantFormat | None = None) -> jax.Array:
    """Row r of x [N, I] times the transposed weight [E, O, I] of its expert, in x's dtype.

    Rows are sorted by expert; `counts` (summing to N) says how many each has, zeros included.
    """
    rounded, weight, kept = treat(x, w, activations)
    y = _times(rounded, weight, counts)
    if kept is not None:
        assert isinstance(w, TreatedWeight)
        y = y + _times(kept, w.columns, counts)
    return y.astype(x.dtype)


def _times(x: jax.Array, w: Any, counts: jax.Array) -> jax.Array:
    rows, experts = x.shape[0], counts.shape[0]
    if rows <= experts:
        # Decode: touch the weights that were hit and no others.
        expert_of_row = jnp.searchsorted(jnp.cumsum(counts), jnp.arange(rows), side="right")
        picked = jax.tree.map(lambda leaf: leaf[expert_of_row], w)
        return jnp.einsum("ni,noi->no", x, dense_array(picked, x.dtype), preferred_element_type=jnp.float32)
    return jax.lax.ragged_dot_general(x, dense_array(w, x.dtype), counts, _RAGGED, preferred_element_type=jnp.float32)


def expert_gate_up(
    x: jax.Array, w1: Any, w3: Any, routing: Routing, *, limit: float, activations: QuantFormat | None = None
) -> jax.Array:
    rows = x[routing.order // routing.experts.shape[1]]
    gate, up = (grouped_matmul(rows, w, routing.counts, activations) for w in (w1, w3))
    weights = routing.weights.reshape(-1)[routing.order][:, None]
    return (swiglu(gate, up, limit) * weights).astype(x.dtype)


def expert_down(hidden: jax.Array, w2: Any, routing: Routing, *, activations: QuantFormat | None = None) -> jax.Array:
    tokens, k = routing.experts.shape
    out = grouped_matmul(hidden, w2, routing.counts, activations)
    # Back to token order by a gather: a scatter-add would sum in an order that depends on the other tokens.
    rows = jnp.arange(tokens * k, dtype=routing.order.dtype)
    place = jnp.zeros_like(routing.order).at[routing.order].set(rows)
    return jnp.sum(out[place].reshape(tokens, k, -1).astype(jnp.float32), axis=1).astype(hidden.dtype)

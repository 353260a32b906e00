"""The definition. Few rows gather their experts' weights; many rows go through XLA's ragged dot."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.formats import QuantFormat
from pallas_kernels.grouped_matmul import layer
from pallas_kernels.products import dequantized_after
from pallas_kernels.quant.weights import TreatedWeight, dense_array, treat
from pallas_kernels.router import Routing

# x [N, I] . w [E, O, I] over I, ragged over N: the [out, in] twin of jax.lax.ragged_dot.
RAGGED = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)


def grouped_matmul(x: jax.Array, w: Any, counts: jax.Array, activations: QuantFormat | None = None) -> jax.Array:
    """Row r of x [N, I] times the transposed weight [E, O, I] of its expert, in x's dtype.

    Rows are sorted by expert; `counts` (summing to N) says how many each has, zeros included.
    """
    rounded, weight, kept = treat(x, w, activations)
    y = times(rounded, weight, counts)
    if kept is not None:
        assert isinstance(w, TreatedWeight)
        y = y + times(kept, w.columns, counts)
    return y.astype(x.dtype)


def row_by_row(x: jax.Array, w: Any, counts: jax.Array, activations: QuantFormat | None = None) -> jax.Array:
    """`grouped_matmul` by one program for every row, however many there are: XLA chooses by that how it adds."""
    rows, experts = x.shape[0], counts.shape[0]
    expert = layer.expert_of_row(counts, rows)
    more = max(0, 2 - rows)  # a loop of one would be no loop, and become a part of what is around it

    def of_row(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        of_x, chosen = jax.lax.optimization_barrier(row)
        return grouped_matmul(of_x[None], w, jnp.zeros(experts, counts.dtype).at[chosen].set(1), activations)[0]

    return jax.lax.map(of_row, (jnp.pad(x, ((0, more), (0, 0))), jnp.pad(expert, (0, more))))[:rows]


def times(x: jax.Array, w: Any, counts: jax.Array) -> jax.Array:
    """float32 [N, O], for a weight that is an array or a QuantTensor and dequantised in x's dtype."""
    rows, experts = x.shape[0], counts.shape[0]
    if rows <= experts:
        # Decode: touch the weights that were hit and no others.
        expert = layer.expert_of_row(counts, rows)
        picked = jax.tree.map(lambda leaf: leaf[expert], w)
        return jnp.einsum("ni,noi->no", x, dense_array(picked, x.dtype), preferred_element_type=jnp.float32)
    x, dense = dequantized_after(x, w, x.dtype)
    return jax.lax.ragged_dot_general(x, dense, counts, RAGGED, preferred_element_type=jnp.float32)


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
    product = row_by_row if batch_invariant else grouped_matmul
    return layer.experts(product, x, w1, w3, w2, routing, limit, activations)


def expert_gate_up(
    x: jax.Array, w1: Any, w3: Any, routing: Routing, *, limit: float, activations: QuantFormat | None = None
) -> jax.Array:
    return layer.gate_up(grouped_matmul, x, w1, w3, routing, limit, activations)


def expert_down(hidden: jax.Array, w2: Any, routing: Routing, *, activations: QuantFormat | None = None) -> jax.Array:
    return layer.down(grouped_matmul, hidden, w2, routing, activations)

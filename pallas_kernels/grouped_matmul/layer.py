"""An expert layer, and its two halves, around any grouped product."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.formats import QuantFormat
from pallas_kernels.quant.weights import shown
from pallas_kernels.router import Routing
from pallas_kernels.swiglu import swiglu

# (rows [N, I] sorted by expert, weight [E, O, I], rows of each expert [E], activations) -> [N, O]
Product = Callable[[jax.Array, Any, jax.Array, QuantFormat | None], jax.Array]


def experts(
    product: Product,
    x: jax.Array,
    w1: Any,
    w3: Any,
    w2: Any,
    routing: Routing,
    limit: float,
    activations: QuantFormat | None,
) -> jax.Array:
    hidden = gate_up(product, x, w1, w3, routing, limit, activations)
    return down(product, hidden, shown(hidden, w2), routing, activations)


def gate_up(
    product: Product, x: jax.Array, w1: Any, w3: Any, routing: Routing, limit: float, activations: QuantFormat | None
) -> jax.Array:
    rows = x[routing.order // routing.experts.shape[1]]
    gate, up = (product(rows, w, routing.counts, activations) for w in (w1, w3))
    weights = routing.weights.reshape(-1)[routing.order][:, None]
    return (swiglu(gate, up, limit) * weights).astype(x.dtype)


def down(product: Product, hidden: jax.Array, w2: Any, routing: Routing, activations: QuantFormat | None) -> jax.Array:
    tokens, k = routing.experts.shape
    out = product(hidden, w2, routing.counts, activations)
    # Back to token order by a gather: a scatter-add would sum in an order that depends on the other tokens.
    rows = jnp.arange(tokens * k, dtype=routing.order.dtype)
    place = jnp.zeros_like(routing.order).at[routing.order].set(rows)
    return summed(out[place].reshape(tokens, k, out.shape[-1])).astype(hidden.dtype)


def summed(of_choices: jax.Array) -> jax.Array:
    """float32 [N, D], the choices of tokens [N, k, D] added in their order: a reduction has none of its own."""
    return functools.reduce(jnp.add, (of_choices[:, i].astype(jnp.float32) for i in range(of_choices.shape[1])))


def expert_of_row(counts: jax.Array, rows: int) -> jax.Array:
    """int [rows]: which expert each of the sorted rows belongs to."""
    return jnp.searchsorted(jnp.cumsum(counts), jnp.arange(rows), side="right")

"""The definition, with the per-head products in memory; kernels never store them."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def index_scores(q: jax.Array, keys: jax.Array, weights: jax.Array) -> jax.Array:
    products = jnp.einsum("bthk,bck->bthc", q, keys.astype(q.dtype), preferred_element_type=jnp.float32)
    return jnp.einsum("bthc,bth->btc", jax.nn.relu(products), weights.astype(jnp.float32))

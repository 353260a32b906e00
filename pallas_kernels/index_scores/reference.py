"""The definition, with the per-head products in memory; kernels never store them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.quant import Rows, decode_rows


def index_scores(q: jax.Array, keys: jax.Array | Rows, weights: jax.Array) -> jax.Array:
    plain = decode_rows(keys, q.dtype) if isinstance(keys, Rows) else keys.astype(q.dtype)
    products = jnp.einsum("bthk,bck->bthc", q, plain, preferred_element_type=jnp.float32)
    return jnp.einsum("bthc,bth->btc", jax.nn.relu(products), weights.astype(jnp.float32))

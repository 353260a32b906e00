"""The definition, with the per-head products in memory; kernels never store them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.quant import Pages, Rows, decode_rows, take_paged


def index_scores(
    q: jax.Array | Rows, keys: jax.Array | Rows | Pages, weights: jax.Array, counts: jax.Array | None = None
) -> jax.Array:
    del counts  # scores that nobody wants may be anything
    if isinstance(q, Rows):
        q = decode_rows(q, weights.dtype)
    if isinstance(keys, Pages):
        keys = take_paged(keys, jnp.broadcast_to(jnp.arange(keys.rows, dtype=jnp.int32), (q.shape[0], keys.rows)))
    plain = decode_rows(keys, q.dtype) if isinstance(keys, Rows) else keys.astype(q.dtype)
    exact = "highest" if q.dtype == jnp.float32 else None  # else GPUs round to TF32
    products = jnp.einsum("bthk,bck->bthc", q, plain, precision=exact, preferred_element_type=jnp.float32)
    return jnp.einsum("bthc,bth->btc", jax.nn.relu(products), weights.astype(jnp.float32), precision="highest")

"""The definition of routing: scores in float32, the k best by score + bias or those given, weights without the bias."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Routing(NamedTuple):
    """Routing of N tokens to k of E experts.

    experts int32 [N, k]; weights float32 [N, k]; scores float32 [N, E] (un-biased, for balance losses);
    counts int32 [E]: rows an expert gets; order int32 [N*k]: the flat (token*k + slot) rows sorted by expert,
    tokens ascending within one.
    """

    experts: jax.Array
    weights: jax.Array
    scores: jax.Array
    counts: jax.Array
    order: jax.Array


def router(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    experts: jax.Array | None,
    *,
    k: int,
    scoring: str,
    normalize: bool,
    scale: float,
) -> Routing:
    logits = jnp.matmul(x.astype(jnp.float32), weight.astype(jnp.float32).T, precision="highest")
    scores = _score(logits, scoring)
    if experts is None:
        biased = scores if bias is None else scores + bias.astype(jnp.float32)[None]
        _, experts = jax.lax.top_k(jax.lax.stop_gradient(biased), k)
    chosen = jnp.take_along_axis(scores, experts, axis=1)
    if normalize and scoring != "softmax":
        chosen = chosen / jnp.maximum(jnp.sum(chosen, axis=1, keepdims=True), 1e-20)
    flat = experts.reshape(-1)
    counts = jnp.sum(flat[:, None] == jnp.arange(weight.shape[0])[None], axis=0, dtype=jnp.int32)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    return Routing(experts, chosen * scale, scores, counts, order)


def _score(logits: jax.Array, scoring: str) -> jax.Array:
    if scoring == "sqrtsoftplus":
        # Clamped to the smallest normal number: below it the gradient of the root would be infinity times zero.
        return jnp.sqrt(jnp.maximum(jax.nn.softplus(logits), jnp.finfo(jnp.float32).tiny))
    if scoring == "sigmoid":
        return jax.nn.sigmoid(logits)
    if scoring == "softmax":
        return jax.nn.softmax(logits, axis=-1)
    raise ValueError(f"scoring is {scoring!r}: sqrtsoftplus, sigmoid or softmax")

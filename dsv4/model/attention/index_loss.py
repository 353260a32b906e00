"""How far the indexer's ranking is from the attention it stands in for: what trains the indexer."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def index_divergence(
    q: jax.Array,
    entries: jax.Array,
    lse: jax.Array,
    sink: jax.Array | None,
    scores: jax.Array,
    visible: jax.Array,
    scale: float,
) -> jax.Array:
    """KL(attention over the visible entries || softmax of their index scores), float32 [B, T].

    The target is the layer's own JOINT softmax (window, entries and sink in one denominator), summed over heads and
    then conditioned on the compressed entries; it carries no gradient. 0 where no entry is visible. `lse` is that of
    the attention over window and selected entries: heads that look elsewhere count less, as they should.
    """
    q, entries, lse, sink = jax.lax.stop_gradient((q, entries, lse, sink))
    seen = jnp.arange(entries.shape[1])[None, None] < visible[..., None]
    entries = jnp.where(jnp.any(seen, axis=1)[..., None], entries, 0).astype(q.dtype)
    denominator = lse if sink is None else jnp.logaddexp(lse, jnp.expand_dims(sink.astype(jnp.float32), (0, 1)))
    logits = jnp.einsum("bthk,bck->bthc", q, entries, preferred_element_type=jnp.float32) * scale
    mass = jnp.where(seen[:, :, None], jnp.exp(logits - denominator[..., None]), 0.0).sum(axis=2)
    target = mass / jnp.maximum(mass.sum(axis=-1, keepdims=True), 1e-20)
    guess = jax.nn.log_softmax(jnp.where(seen, scores, -1e30), axis=-1)
    log_target = jnp.log(jnp.maximum(target, 1e-20))
    return jnp.sum(jnp.where(seen, target * (log_target - guess), 0.0), axis=-1)

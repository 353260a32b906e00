"""Exact bits per byte of held-out text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from dsv4.decoding.run import forward_body
from dsv4.model.handle import Model
from dsv4.training.data import EvalWindows, bits_per_byte


def held_out_bits(model: Model, windows: EvalWindows, batch: int = 8) -> float:
    """Bits per byte of the text that `windows` score, by full-sequence passes."""
    nats = 0.0
    for tokens, scored in windows.batches(batch):
        nats += float(_nats(model, jnp.asarray(tokens), jnp.asarray(scored)))
    return bits_per_byte(nats, int(windows.text_bytes.sum()))


@jax.jit
def _nats(model: Model, tokens: jax.Array, scored: jax.Array) -> jax.Array:
    logits, _ = forward_body(model, tokens[:, :-1], False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.sum(jnp.where(scored, losses, 0.0))

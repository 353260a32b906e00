"""Greedy continuation of several prompts at once, through prefill and the cache."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dsv4.decoding.run import extend_body, prefill
from dsv4.model.cache import Cache
from dsv4.model.handle import Model


def continuation(model: Model, prompts: np.ndarray, new: int) -> np.ndarray:
    """The `new` most likely tokens one after the other, int32 [P, new], after prompts [P, T]; nothing ends a row early.

    Raises InputError where they do not fit the model's context.
    """
    logits, cache = prefill(model, prompts, capacity=prompts.shape[1] + new)
    return np.asarray(_continue(model, logits, cache, new))


@functools.partial(jax.jit, static_argnums=3)
def _continue(model: Model, logits: jax.Array, cache: Cache, new: int) -> jax.Array:
    first = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def step(carry: tuple[jax.Array, Cache], _: None) -> tuple[tuple[jax.Array, Cache], jax.Array]:
        token, cache = carry
        logits, cache = extend_body(model, token[:, None], jnp.ones_like(token), cache)
        following = jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)
        return (following, cache), following

    _, others = jax.lax.scan(step, (first, cache), None, length=new - 1)
    return jnp.concatenate([first[None], others]).T

"""Choosing the next token on the device: greedy, or drawn from the tempered top-k and top-p of the logits."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from numbers import Real

import jax
import jax.numpy as jnp

from dsv4.decoding.inputs import InputError


@functools.partial(jax.tree_util.register_dataclass, data_fields=("temperature", "top_k", "top_p"), meta_fields=())
@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. A pytree of three scalars, so that changing one compiles nothing again.

    temperature: the logits are divided by it; 0 takes the most likely token. top_k: only the k most likely tokens, 0
    for all of them. top_p: of those, only the most likely ones that together reach this probability (the one that
    crosses it included), 1 for all. Each may also be an array [B], one value a row.
    """

    temperature: float | jax.Array = 0.0
    top_k: int | jax.Array = 0
    top_p: float | jax.Array = 1.0

    def __post_init__(self) -> None:
        # Inside jit, and while a tree is mapped, the fields are not numbers and were checked before.
        if isinstance(self.temperature, Real) and not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}: 0 (greedy) or a positive number")
        if isinstance(self.top_k, Real) and (self.top_k < 0 or self.top_k != int(self.top_k)):
            raise InputError(f"top_k is {self.top_k}: 0 (all tokens) or a positive integer")
        if isinstance(self.top_p, Real) and not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}: above 0 and at most 1 (all tokens)")


def sample(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Token ids int32 [B] for logits [B, V]. Equal logits rank by id, lower first, also where top_k cuts them.

    A row whose logits are not numbers gets whatever argmax makes of it: callers check capacity before they decode.
    """
    logits = logits.astype(jnp.float32)
    batch = logits.shape[0]
    temperature, top_k, top_p = (
        jnp.broadcast_to(jnp.asarray(value, dtype), batch)[:, None]
        for value, dtype in (
            (sampling.temperature, jnp.float32),
            (sampling.top_k, jnp.int32),
            (sampling.top_p, jnp.float32),
        )
    )
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        scaled = logits / jnp.where(temperature > 0, temperature, 1.0)
        kept = jax.lax.cond(  # the sort costs more than everything else here: only where a row asks for it
            jnp.any((top_k > 0) | (top_p < 1)),
            lambda: _likely(scaled, top_k, top_p),
            lambda: jnp.ones(scaled.shape, bool),
        )
        return jax.random.categorical(key, jnp.where(kept, scaled, -jnp.inf)).astype(jnp.int32)

    drawn = jax.lax.cond(jnp.any(temperature > 0), draw, lambda: greedy)
    return jnp.where(temperature[:, 0] > 0, drawn, greedy)


def _likely(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Which of logits [B, V] top_k and top_p [B, 1] keep; always the most likely one."""
    vocab = logits.shape[-1]
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(vocab)[None]
    ranked = jnp.where(rank < jnp.where(top_k > 0, top_k, vocab), ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = (ranked > -jnp.inf) & ((before < top_p) | (rank == 0))
    return jnp.zeros(logits.shape, bool).at[jnp.arange(logits.shape[0])[:, None], order].set(kept)

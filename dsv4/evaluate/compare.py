"""Two models on the same tokens: what of their logits and selections is the same."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsv4.decoding.run import forward_body
from dsv4.model.attention.select import visible
from dsv4.model.handle import Model

Selections = tuple[jax.Array, ...]  # int32 [B, L, k] of each CSA layer


class Sums(NamedTuple):
    """Sums over the scored targets of each window, float32 [windows].

    nats: negative log likelihood. kl: KL(baseline || model), nats. agreed: same most likely token. choices: CSA layers
    times queries that have to choose (more visible entries than the top-k). overlap: the share of the baseline's
    entries that the model selected too, summed over those.
    """

    nats: Any
    kl: Any
    agreed: Any
    overlap: Any
    choices: Any

    @classmethod
    def joined(cls, parts: Sequence[Sums], windows: int) -> Sums:
        """The sums of consecutive batches as those of all `windows`; what filled the last batch is dropped."""
        return cls(*(np.concatenate(column)[:windows] for column in zip(*parts, strict=True)))


@jax.jit
def full_pass(model: Model, tokens: jax.Array) -> tuple[jax.Array, Selections]:
    """Logits float32 [B, L, V] of tokens [B, L], and what each CSA layer selected."""
    logits, trace = forward_body(model, tokens, True)
    assert trace is not None
    selected = [layer.attention.selected for layer in trace.layers]  # None where a layer has nothing to select from
    csa = (layer.kind == "csa" for layer in model.config.layers)
    return logits, tuple(
        indices for indices, chooses in zip(selected, csa, strict=True) if chooses and indices is not None
    )


@functools.partial(jax.jit, static_argnames="ratios")
def compare(
    logits: jax.Array,
    selected: Selections,
    baseline: jax.Array,
    baseline_selected: Selections,
    targets: jax.Array,
    scored: jax.Array,
    *,
    ratios: tuple[int, ...],
) -> Sums:
    """Sums of windows from both models' logits float32 [B, L, V] and selections, for targets int32 [B, L].

    scored bool [B, L]: the targets that count. ratios: tokens an entry stands for, of each CSA layer.
    """
    total = functools.partial(jnp.sum, axis=-1)
    ours, theirs = jax.nn.log_softmax(logits), jax.nn.log_softmax(baseline)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    kl = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)
    agreed = (jnp.argmax(logits, axis=-1) == jnp.argmax(baseline, axis=-1)) & scored
    shared = choices = jnp.zeros(scored.shape[0], jnp.float32)
    for one, other, ratio in zip(selected, baseline_selected, ratios, strict=True):
        choosing = scored & (visible(jnp.arange(scored.shape[1]), ratio) > one.shape[-1])[None]
        shared += total(jnp.where(choosing, common(one, other) / one.shape[-1], 0.0))
        choices += total(choosing.astype(jnp.float32))
    return Sums(
        total(jnp.where(scored, losses, 0.0)),
        total(jnp.where(scored, kl, 0.0)),
        total(agreed.astype(jnp.float32)),
        shared,
        choices,
    )


def common(one: jax.Array, other: jax.Array) -> jax.Array:
    """How many indices each query has in both lists int32 [..., k], float32 [...]; -1 is none.

    A list names an index once: what stands twice in the two together is in both.
    """
    both = jnp.sort(jnp.concatenate([one, other], axis=-1), axis=-1)
    twice = (both[..., 1:] == both[..., :-1]) & (both[..., 1:] >= 0)
    return jnp.sum(twice, axis=-1).astype(jnp.float32)


def first_divergence(tokens: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """How many tokens each row of [P, M] has in common with the baseline's before the first that differs; M if none."""
    different = tokens != baseline
    return np.where(different.any(axis=1), different.argmax(axis=1), tokens.shape[1])

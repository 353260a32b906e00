"""What training minimises: next token, the one after (MTP), expert balance, indexer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsv4.config import ModelConfig, TrainConfig
from dsv4.model.handle import Model
from dsv4.model.moe import MoETrace


def loss(
    model: Model, tokens: jax.Array, train: TrainConfig, *, attend_all: bool = False
) -> tuple[jax.Array, dict[str, Any]]:
    """Total loss (float32 scalar) of tokens int32 [B, T+1], and its parts.

    Parts: next, mtp, balance, indexer (nats a token; balance has no unit), and `load`, {layer name: float32 [E]}: the
    share of routed tokens each expert got, which moves the router biases.
    """
    with jax.default_matmul_precision(model.execution.precision):
        module = model.bind()
        ids, targets = tokens[:, :-1], tokens[:, 1:]
        count = jnp.full(ids.shape[0], ids.shape[1], jnp.int32)
        hidden, _, trace = module(ids, count, None, attend_all=attend_all)
        parts: dict[str, Any] = {"next": cross_entropy(module.logits(hidden), targets)}
        routed = {f"layers.{i}": layer.moe for i, layer in enumerate(trace.layers)}
        if model.config.mtp_blocks:
            # At position t the block sees token t+1 and guesses t+2: one position less than the main loss.
            logits, block = module.predict_next(trace.layers[-1].streams[:, :-1], ids[:, 1:])
            parts["mtp"] = cross_entropy(logits, targets[:, 1:])
            routed["mtp.0"] = block.moe
    scored = {name: moe for name, moe in routed.items() if moe is not None and not _hashed(model.config, name)}
    parts["load"] = {name: expert_load(moe) for name, moe in scored.items()}
    zero = jnp.zeros((), jnp.float32)
    parts["balance"] = sum((balance(moe) for moe in scored.values()), zero)
    divergences = [layer.attention.index_divergence for layer in trace.layers]
    parts["indexer"] = sum((jnp.mean(d) for d in divergences if d is not None), zero)
    total = parts["next"] + train.mtp_weight * parts.get("mtp", zero)
    total = total + train.balance_weight * parts["balance"] + train.indexer_weight * parts["indexer"]
    return total, parts


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean negative log likelihood, nats a token, of targets [B, T] under logits [B, T, V]."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def expert_load(moe: MoETrace) -> jax.Array:
    """Share of the routed rows that each expert got, float32 [E], summing to 1."""
    return jnp.mean(_hits(moe), axis=(0, 1)) / moe.experts.shape[-1]


def balance(moe: MoETrace) -> jax.Array:
    """Sequence-wise balance loss: E times the sum over experts of load share times mean score share; 1 if even."""
    experts = moe.scores.shape[-1]
    share = jnp.mean(_hits(moe), axis=1) / moe.experts.shape[-1]  # [B, E]
    score = jnp.mean(moe.scores / jnp.sum(moe.scores, axis=-1, keepdims=True), axis=1)
    return experts * jnp.mean(jnp.sum(jax.lax.stop_gradient(share) * score, axis=-1))


def _hits(moe: MoETrace) -> jax.Array:
    """float32 [B, T, E]: 1 where a token took an expert."""
    experts = jnp.arange(moe.scores.shape[-1])[None, None, None]
    return jnp.sum((moe.experts[..., None] == experts).astype(jnp.float32), axis=2)


def _hashed(config: ModelConfig, name: str) -> bool:
    kind, _, number = name.partition(".")
    return kind == "layers" and config.hashed(int(number))

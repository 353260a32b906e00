"""Fresh parameters from a config: each leaf drawn from its own key, so that adding one changes no other."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from dsv4.config import ModelConfig
from dsv4.parameters import FLOAT32_CLASSES, Spec, leaves, model_specs, nest, tensor_name

# Bias of the mixing logits towards the identity: at the start each stream mostly carries itself on.
COMB_DIAGONAL = 4.0


def init_params(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> dict[Any, Any]:
    """A parameter tree for `config`, float32 or `dtype` where the released layout allows it."""

    def leaf(path: tuple[Any, ...], spec: Spec) -> jax.Array:
        value = _draw(spec, jax.random.fold_in(key, zlib.crc32(tensor_name(path).encode())), config)
        return value if spec.kind == "hash" or spec.kind in FLOAT32_CLASSES else value.astype(dtype)

    return nest((path, leaf(path, spec)) for path, spec in leaves(model_specs(config)))


def _draw(spec: Spec, key: jax.Array, config: ModelConfig) -> jax.Array:
    match spec.init:
        case "fan_in":
            return jax.random.normal(key, spec.shape) * spec.shape[-1] ** -0.5
        case "embedding":
            return jax.random.normal(key, spec.shape)
        case "small":
            return jax.random.normal(key, spec.shape) * 0.02 * spec.shape[-1] ** -0.5
        case "ones":
            return jnp.ones(spec.shape)
        case "zeros":
            return jnp.zeros(spec.shape)
        case "hyper_base":
            return _hyper_base(config.residual.streams)
        case "hash":
            vocab, k = spec.shape
            return balanced_table(key, vocab, k, config.moe.experts)


def _hyper_base(n: int) -> jax.Array:
    """pre = 1/n each, post = 1 each, comb near the identity: a plain residual, n times."""
    into = jnp.full(n, -jnp.log(n - 1.0)) if n > 1 else jnp.full(1, 10.0)
    return jnp.concatenate([into, jnp.zeros(n), (COMB_DIAGONAL * jnp.eye(n)).reshape(-1)])


def balanced_table(key: jax.Array, vocab: int, k: int, experts: int) -> jax.Array:
    """A hash table int32 [vocab, k]: every expert gets the same share of tokens, no token the same expert twice.

    Token t in a random order takes k consecutive experts of a random cycle, starting at t * k.
    """
    order_key, cycle_key = jax.random.split(key)
    order = jax.random.permutation(order_key, vocab)
    cycle = jax.random.permutation(cycle_key, experts)
    return cycle[(order[:, None] * k + jnp.arange(k)[None]) % experts].astype(jnp.int32)

"""Parameters as a flat {released name: array}, split into what a gradient moves and what it does not."""

from __future__ import annotations

from typing import Any

import jax

from dsv4.config import ModelConfig
from dsv4.parameters import Spec, leaves, model_specs, nest, tensor_name

Flat = dict[str, jax.Array]


def named_specs(config: ModelConfig) -> dict[str, Spec]:
    """Spec of every leaf by its released name."""
    return {tensor_name(path): spec for path, spec in leaves(model_specs(config))}


def flatten(config: ModelConfig, params: dict[Any, Any]) -> Flat:
    """The nested tree as {released name: array}."""
    flat = {}
    for path, _ in leaves(model_specs(config)):
        node: Any = params
        for part in path:
            node = node[part]
        flat[tensor_name(path)] = node
    return flat


def unflatten(config: ModelConfig, flat: Flat) -> dict[Any, Any]:
    """The inverse of `flatten`."""
    return nest((path, flat[tensor_name(path)]) for path, _ in leaves(model_specs(config)))


def split(config: ModelConfig, params: dict[Any, Any]) -> tuple[Flat, Flat]:
    """(trainable, buffers): buffers are router biases, moved by load, and hash tables, never moved."""
    flat, specs = flatten(config, params), named_specs(config)
    trainable = {name: leaf for name, leaf in flat.items() if specs[name].trainable}
    return trainable, {name: leaf for name, leaf in flat.items() if name not in trainable}

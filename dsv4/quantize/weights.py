"""Quantises the weights of a model, one leaf at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4.config import ConfigError, ModelConfig
from dsv4.config.recipe import Recipe
from dsv4.config.storage import QUANTIZED_CLASSES
from dsv4.model.handle import Model
from dsv4.parameters import Spec, leaves, model_specs, nest, tensor_name
from pallas_kernels.formats import QuantFormat
from pallas_kernels.quant import QuantTensor, TreatedWeight, quantize
from pallas_kernels.quant.hadamard import rotate_blocks

TREATED_CLASSES = ("dense", "expert")  # multiplied by activations that are quantised
UNTREATED_INPUTS = ("wo_a",)  # whose activations the released code leaves alone


def quantize_model(model: Model, recipe: Recipe) -> Model:
    """`model` under `recipe`: its weights quantised, its execution and storage saying so.

    Scales of activations are computed as they come. Raises ConfigError for a weight that is quantised already,
    FormatError for a shape a format cannot hold, both naming the tensor.
    """
    params = dict(quantized_leaves(model.config, model.params, recipe))
    storage = recipe.storage(model.config.storage)
    config = dataclasses.replace(model.config, storage=storage)
    return model.replace(config=config, params=nest(params.items()), execution=recipe.execution(model.execution))


def quantized_leaves(config: ModelConfig, params: Any, recipe: Recipe) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(path, leaf) of every parameter of `config` under `recipe`, in order."""
    for path, spec in leaves(model_specs(config)):
        leaf = params
        for part in path:
            leaf = leaf[part]
        yield path, quantize_leaf(tensor_name(path), spec, leaf, recipe)


def quantize_leaf(
    name: str,
    spec: Spec,
    weight: Any,
    recipe: Recipe,
    *,
    input_scale: float | None = None,
    channel_amax: np.ndarray | None = None,
) -> Any:
    """One parameter under `recipe`; those of a class that the recipe leaves alone come back as they are.

    input_scale: a static scale for its activations. channel_amax [in]: largest magnitude of each input channel, which
    says which channels are outliers; without it the weight's own columns do.
    """
    field = QUANTIZED_CLASSES.get(spec.kind)
    form: QuantFormat | None = None if field is None else getattr(recipe, field)
    if form is None:
        return weight
    if isinstance(weight, QuantTensor | TreatedWeight):
        raise ConfigError(f"{name} is quantised already: start from the 16-bit checkpoint, rounding twice adds error")
    if reason := form.unsupported_reason(tuple(weight.shape)):
        raise ConfigError(f"{name} cannot be {form.name}: {reason}; choose another format for {field}")
    treated = spec.kind in TREATED_CLASSES
    input_scale = input_scale if treated and not untreated_input(name) else None
    if not treated or not (recipe.rotate or recipe.outlier_channels or input_scale):
        return _quantize(weight, form)
    channels = columns = None
    if recipe.outlier_channels:
        channels = outlier_channels(weight, channel_amax, recipe.outlier_channels)
        columns = weight[..., channels].astype(jnp.bfloat16)
        weight = weight.at[..., channels].set(0)
    if recipe.rotate:
        weight = rotate_blocks(weight.astype(jnp.float32))
    scale = None if input_scale is None else jnp.full((1, 1), input_scale, jnp.float32)
    return TreatedWeight(_quantize(weight, form), scale, channels, columns, recipe.rotate)


def untreated_input(name: str) -> bool:
    """Whether the input of this weight is never quantised."""
    return name.split(".")[-2] in UNTREATED_INPUTS


def outlier_channels(weight: jax.Array, channel_amax: np.ndarray | None, count: int) -> jax.Array:
    """The input channels with the largest magnitudes, int32 [count] in ascending order."""
    if channel_amax is None:
        channel_amax = np.asarray(jnp.max(jnp.abs(weight.astype(jnp.float32)), axis=tuple(range(weight.ndim - 1))))
    count = min(count, weight.shape[-1])
    best = np.argsort(-channel_amax, kind="stable")[:count]
    return jnp.asarray(np.sort(best), jnp.int32)


_quantize = jax.jit(quantize, static_argnums=1)

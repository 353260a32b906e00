"""Quantises the weights of a model, one leaf at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4.config import ConfigError, ModelConfig
from dsv4.config.recipe import Recipe
from dsv4.config.storage import QUANTIZED_CLASSES, TREATED_CLASSES, untreated_input
from dsv4.model.handle import Model
from dsv4.parameters import Spec, leaves, model_specs, nest, tensor_name
from pallas_kernels.formats import QuantFormat
from pallas_kernels.quant import QuantTensor, TreatedWeight, quantize
from pallas_kernels.quant.hadamard import rotate_blocks

if TYPE_CHECKING:
    from dsv4.quantize.calibrate import Calibration


def quantize_model(model: Model, recipe: Recipe, calibration: Calibration | None = None) -> Model:
    """`model` under `recipe`: its weights quantised, its execution and storage saying so.

    calibration: of this model under this recipe (dsv4.quantize.calibrate); without one, scales of activations are
    computed as they come. Raises ConfigError, naming the tensor, for a weight that is quantised already or whose shape
    its format cannot hold.
    """
    static = any(found.input_scale is not None for found in (calibration or {}).values())
    params = dict(quantized_leaves(model.config, model.params, recipe, calibration))
    storage = recipe.storage(model.config.storage, static=static)
    config = dataclasses.replace(model.config, storage=storage)
    return model.replace(config=config, params=nest(params.items()), execution=recipe.execution(model.execution))


def quantized_leaves(
    config: ModelConfig, params: Any, recipe: Recipe, calibration: Calibration | None = None
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(path, leaf) of every parameter of `config` under `recipe`, in order."""
    for path, spec in leaves(model_specs(config)):
        leaf, name = params, tensor_name(path)
        for part in path:
            leaf = leaf[part]
        known = calibration.get(name) if calibration else None
        found = {} if known is None else {"input_scale": known.input_scale, "channel_amax": known.channel_amax}
        yield path, quantize_leaf(name, spec, leaf, recipe, **found)


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
        amax = weight_amax(weight) if channel_amax is None else channel_amax
        channels = jnp.asarray(largest_channels(amax, recipe.outlier_channels))
        columns = weight[..., channels].astype(jnp.bfloat16)
        weight = weight.at[..., channels].set(0)
    if recipe.rotate:
        weight = rotate_blocks(weight.astype(jnp.float32))
    scale = None if input_scale is None else jnp.full((1, 1), input_scale, jnp.float32)
    return TreatedWeight(_quantize(weight, form), scale, channels, columns, recipe.rotate)


def weight_amax(weight: jax.Array) -> np.ndarray:
    """The largest magnitude of each input channel of a weight [..., out, in], float32 [in]."""
    return np.asarray(jnp.max(jnp.abs(weight.astype(jnp.float32)), axis=tuple(range(weight.ndim - 1))))


def largest_channels(channel_amax: np.ndarray, count: int) -> np.ndarray:
    """The `count` input channels (at most all) with the largest magnitudes, int32 in ascending order."""
    best = np.argsort(-channel_amax, kind="stable")[: min(count, len(channel_amax))]
    return np.sort(best).astype(np.int32)


_quantize = jax.jit(quantize, static_argnums=1)

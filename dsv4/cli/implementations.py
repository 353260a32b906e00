"""Which implementation of every op a model would run, found by tracing it without data."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from dsv4.config import ConfigError, Execution, ModelConfig
from dsv4.config.execution import Float
from dsv4.config.recipe import Recipe, execution_for
from dsv4.decoding.run import extend_body
from dsv4.model.cache import init_cache
from dsv4.model.handle import Model
from dsv4.parameters import FLOAT32_CLASSES, Spec, leaves, model_specs, nest, tensor_name
from dsv4.quantize.weights import TREATED_CLASSES, untreated_input
from pallas_kernels.dispatch import OPS, Call, listen
from pallas_kernels.formats import FormatError
from pallas_kernels.quant import QuantTensor, TreatedWeight

CONTEXT = 4096
# Tokens of each sequence in the traced call, and sequences.
PHASES = {"prefill": (512, 1), "decode": (1, 8)}
Calls = dict[str, list[Call]]  # phase -> what happened in it


def traced_calls(config: ModelConfig, recipe: Recipe | None = None, dtype: Float | None = None) -> Calls:
    """Every call of an op in a prefill chunk and in a decode step of `config`, one layer of each kind.

    recipe: the formats of weights, activations and cache; None for those that `config` is stored in. dtype: that the
    model runs in, this machine's by default. Raises ConfigError for formats that cannot hold the shapes of `config`.
    """
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    base = Execution(dtype=dtype, precision="default")
    if recipe is None:
        execution = execution_for(config.storage, base)
    else:
        config = dataclasses.replace(config, storage=recipe.storage(config.storage))
        execution = recipe.execution(base)
    config = _one_layer_of_each_kind(config)
    found = {}
    for phase, (tokens, batch) in PHASES.items():
        with listen() as found[phase]:
            try:
                _trace(config, execution, batch, tokens)
            except FormatError as error:  # of what a layer is given: its width does not divide into tiles
                raise ConfigError(f"the formats do not fit the config: {error}") from error
    return found


def chosen_implementations(calls: Calls) -> dict[str, dict[str, list[str]]]:
    """Op -> the implementations that ran in each phase, and `name: reason` of those that refused; each thing once.

    Every registered op is listed, also those that were not called.
    """
    import_every_op()
    found: dict[str, dict[str, list[str]]] = {
        name: {**{phase: [] for phase in calls}, "refused": []} for name in sorted(OPS)
    }
    for phase, phase_calls in calls.items():
        for call in phase_calls:
            op = found[call.op.name]
            op[phase] = list(dict.fromkeys([*op[phase], call.ran]))
            op["refused"] = list(dict.fromkeys([*op["refused"], *call.refusals]))
    return found


def import_every_op() -> None:
    """An op registers itself when its package is imported."""
    for module in pkgutil.iter_modules(pallas_kernels.__path__):
        if module.ispkg:
            importlib.import_module(f"pallas_kernels.{module.name}")


def _one_layer_of_each_kind(config: ModelConfig) -> ModelConfig:
    """Layers of the same kind call the same ops; the first stays hash-routed where the model has such layers."""
    layers = tuple(dict.fromkeys(config.layers))
    hashed = min(config.moe.hash_layers, 1)
    return dataclasses.replace(
        config,
        layers=(layers[0], *layers) if hashed else layers,
        moe=dataclasses.replace(config.moe, hash_layers=hashed),
        max_context=max(config.max_context, CONTEXT),
        mtp_blocks=0,
    )


def _trace(config: ModelConfig, execution: Execution, batch: int, tokens: int) -> None:
    model = Model(config, abstract_parameters(config), execution)
    ids = jax.ShapeDtypeStruct((batch, tokens), jnp.int32)
    count = jax.ShapeDtypeStruct((batch,), jnp.int32)
    cache = jax.eval_shape(lambda: init_cache(config, execution, batch, CONTEXT))
    # A function of its own each time: jax would remember the trace of one it has seen, and call no op.
    jax.eval_shape(lambda *args: extend_body(*args), model, ids, count, cache)


def abstract_parameters(config: ModelConfig) -> dict[Any, Any]:
    """The parameter tree as a checkpoint of `config.storage` has it, shapes and dtypes only."""
    return nest((path, _abstract(tensor_name(path), spec, config)) for path, spec in leaves(model_specs(config)))


def _abstract(name: str, spec: Spec, config: ModelConfig) -> Any:
    storage = config.storage
    if (form := storage.format_of(spec.kind)) is not None:
        if reason := form.unsupported_reason(spec.shape):
            raise ConfigError(f"{name} cannot be {form.name}: {reason}")
        values = jax.ShapeDtypeStruct(form.values_shape(spec.shape), form.values_dtype)
        weight = QuantTensor(values, jax.ShapeDtypeStruct(form.scale_shape(spec.shape), form.scale_dtype), form)
        return _treated(name, weight, config) if spec.kind in TREATED_CLASSES else weight
    dtype = storage.dtype
    if spec.kind == "hash":
        dtype = "int32"
    elif spec.kind in FLOAT32_CLASSES:
        dtype = "float32"
    return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(dtype))


def _treated(name: str, weight: QuantTensor, config: ModelConfig) -> Any:
    storage = config.storage
    static = storage.static_activations and not untreated_input(name)
    count = min(storage.outlier_channels, weight.shape[-1])
    if not (static or count or storage.rotate):
        return weight
    scale = jax.ShapeDtypeStruct((1, 1), jnp.float32) if static else None
    channels = jax.ShapeDtypeStruct((count,), jnp.int32) if count else None
    columns = jax.ShapeDtypeStruct((*weight.shape[:-1], count), jnp.bfloat16) if count else None
    return TreatedWeight(weight, scale, channels, columns, storage.rotate)

"""Which implementation of every op a model would run on this machine, found by tracing it without data."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from dsv4.config import Execution, ModelConfig
from dsv4.decoding.run import extend_body
from dsv4.model.cache import init_cache
from dsv4.model.handle import Model
from dsv4.parameters import FLOAT32_CLASSES, Spec, leaves, model_specs
from pallas_kernels.dispatch import OPS, Candidate, Op
from pallas_kernels.quant import QuantTensor

CONTEXT = 4096
# Tokens of each sequence in the traced call, and sequences.
PHASES = {"prefill": (512, 1), "decode": (1, 8)}


@dataclass
class Seen:
    """What one op did in one phase, in the order in which it happened, each thing once."""

    ran: list[str]
    refused: list[str]


def chosen_implementations(config: ModelConfig) -> dict[str, dict[str, list[str]]]:
    """Op -> the implementations a prefill chunk and a decode step use, and `name: reason` of those that refused.

    Every registered op is listed, also those that `config` does not use.
    """
    _import_every_op()
    config = _one_layer_of_each_kind(config)
    found: dict[str, dict[str, list[str]]] = {
        name: {"prefill": [], "decode": [], "refused": []} for name in sorted(OPS)
    }
    for phase, (tokens, batch) in PHASES.items():
        with _watched() as seen:
            _trace(config, batch, tokens)
        for name, what in seen.items():
            found[name][phase] = what.ran
            found[name]["refused"] = list(dict.fromkeys([*found[name]["refused"], *what.refused]))
    return found


def _import_every_op() -> None:
    """An op registers itself when its package is imported."""
    for module in pkgutil.iter_modules(pallas_kernels.__path__):
        if module.ispkg:
            importlib.import_module(f"pallas_kernels.{module.name}")


def _one_layer_of_each_kind(config: ModelConfig) -> ModelConfig:
    """Layers of the same kind call the same ops; the first stays hash-routed where the model has such layers."""
    layers = tuple(dict.fromkeys(config.layers))
    hashed = min(config.moe.hash_layers, 1)
    return replace(
        config,
        layers=(layers[0], *layers) if hashed else layers,
        moe=replace(config.moe, hash_layers=hashed),
        max_context=max(config.max_context, CONTEXT),
        mtp_blocks=0,
    )


@contextlib.contextmanager
def _watched() -> Iterator[dict[str, Seen]]:
    """Puts a recorder around every candidate of every op while the block runs."""
    seen = {name: Seen([], []) for name in OPS}
    before = {name: op.candidates for name, op in OPS.items()}
    for op in OPS.values():
        op.candidates = tuple(_recorded(op, candidate, seen[op.name]) for candidate in op.candidates)
    try:
        yield seen
    finally:
        for name, candidates in before.items():
            OPS[name].candidates = candidates


def _recorded(op: Op, candidate: Candidate, seen: Seen) -> Candidate:
    def run(*args: Any, **kwargs: Any) -> Any:
        if candidate.name not in seen.ran:
            seen.ran.append(candidate.name)
        return candidate.run(*args, **kwargs)

    def unsupported_reason(*args: Any, **kwargs: Any) -> str | None:
        reason = candidate.unsupported_reason(*args, **kwargs)
        if reason is not None and (said := f"{candidate.name}: {reason}") not in seen.refused:
            seen.refused.append(said)
        return reason

    return Candidate(candidate.name, run, unsupported_reason)


def _trace(config: ModelConfig, batch: int, tokens: int) -> None:
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    execution = Execution(dtype=dtype, precision="default")
    model = Model(config, abstract_parameters(config), execution)
    ids = jax.ShapeDtypeStruct((batch, tokens), jnp.int32)
    count = jax.ShapeDtypeStruct((batch,), jnp.int32)
    cache = jax.eval_shape(lambda: init_cache(config, execution, batch, CONTEXT))
    # A function of its own each time: jax would remember the trace of one it has seen, and call no op.
    jax.eval_shape(lambda *args: extend_body(*args), model, ids, count, cache)


def abstract_parameters(config: ModelConfig) -> dict[Any, Any]:
    """The parameter tree as a checkpoint of `config.storage` has it, shapes and dtypes only."""
    tree: dict[Any, Any] = {}
    for path, spec in leaves(model_specs(config)):
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = _abstract(spec, config)
    return tree


def _abstract(spec: Spec, config: ModelConfig) -> Any:
    storage = config.storage
    if (form := storage.format_of(spec.kind)) is not None:
        values = jax.ShapeDtypeStruct(form.values_shape(spec.shape), form.values_dtype)
        return QuantTensor(values, jax.ShapeDtypeStruct(form.scale_shape(spec.shape), form.scale_dtype), form)
    dtype = storage.dtype
    if spec.kind == "hash":
        dtype = "int32"
    elif spec.kind in FLOAT32_CLASSES:
        dtype = "float32"
    return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(dtype))

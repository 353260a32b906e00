"""Models and the ways through them, compiled once for every module of this folder, as the fixture `ways`."""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4
from dsv4.config import Execution, ModelConfig, load_config
from dsv4.decoding.run import _last_body, extend_body, forward_body
from dsv4.model.cache import Cache, init_cache
from dsv4.model.handle import Model
from dsv4.parameters import Spec, leaves, model_specs

ORACLE = Path(__file__).parents[1] / "oracle" / "ckpt"


forward = jax.jit(lambda model, ids: forward_body(model, ids, False)[0])
extend, last_logits = jax.jit(extend_body), jax.jit(_last_body)


@pytest.fixture(scope="session")
def ways():
    """The functions below: test modules cannot import one another."""
    return sys.modules[__name__]


@functools.cache
def model_of(name: str) -> Model:
    """`tiny` with random parameters, `small` as shipped or its first layers, one a kind, or a recorded checkpoint."""
    match name:
        case "tiny":
            return random_model(load_config("tiny").model)
        case "small":
            return dsv4.load("small")
        case "small's kinds":
            return dsv4.load("small", layers=range(3))
        case _:
            return dsv4.load(ORACLE / name, execution=Execution())


def random_model(config: ModelConfig, seed: int = 0) -> Model:
    """Every parameter away from its neutral value: fresh ones (sinks 0, norms 1, ...) would hide mistakes."""
    rng = np.random.default_rng(seed)
    params: dict = {}
    for path, spec in leaves(model_specs(config)):
        node = params
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = jnp.asarray(_draw(rng, spec, config))
    return Model(config, params)


def _draw(rng: np.random.Generator, spec: Spec, config: ModelConfig) -> np.ndarray:
    noise = rng.normal(size=spec.shape)
    match spec.kind:
        case "hash":
            vocab, k = spec.shape
            return rng.permuted(np.tile(np.arange(config.moe.experts), (vocab, 1)), axis=1)[:, :k].astype(np.int32)
        case "norm" | "hyper_gain":
            value = 1 + 0.3 * noise
        case "sink" | "position":
            value = noise
        case "bias":
            value = 0.2 * noise
        case "embedding":
            value = noise
        case _:
            value = noise * spec.shape[-1] ** -0.5
    return value.astype(np.float32)


# With these ids no selection of entries or experts of the models here is closer than 1e-5: rounding, which differs from
# one program to the next, cannot decide one.
CLEAR = 1


def random_ids(model: Model, *shape: int, seed: int = CLEAR) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, shape).astype(np.int32)


def empty(model: Model, batch: int, capacity: int) -> Cache:
    return init_cache(model.config, model.execution, batch, capacity)


def feed(
    model: Model, ids: np.ndarray, begin: np.ndarray, count: np.ndarray, width: int, cache: Cache, pad: int = 3
) -> tuple[np.ndarray, Cache]:
    """ids[b, begin[b] : begin[b] + count[b]] through `extend`, right-padded to `width`: logits [B, width, V]."""
    rows = np.full((len(ids), width), pad, np.int32)
    for b, (first, n) in enumerate(zip(begin, count, strict=True)):
        rows[b, :n] = ids[b, first : first + n]
    logits, cache = extend(model, rows, np.asarray(count, np.int32), cache)
    return np.asarray(logits), cache


def through_chunks(model: Model, ids: np.ndarray, size: int, width: int, cache: Cache) -> tuple[np.ndarray, Cache]:
    """Logits [B, T, V] of ids [B, T] fed `size` tokens at a time."""
    parts = []
    for begin in range(0, ids.shape[1], size):
        count = min(size, ids.shape[1] - begin)
        logits, cache = feed(model, ids, np.full(len(ids), begin), np.full(len(ids), count), width, cache)
        parts.append(logits[:, :count])
    return np.concatenate(parts, axis=1), cache

"""Which optimiser moves which parameter, as in DeepSeek-V4 (arXiv 2606.19348), and the learning-rate schedule."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from dsv4.config import ModelConfig, TrainConfig
from dsv4.parameters import TensorClass
from dsv4.training.tree import Flat, named_specs

# Every weight matrix but the embedding and the head; hc `fn` matrices included.
MATRICES: frozenset[TensorClass] = frozenset({"dense", "expert", "projection", "router", "hyper"})
# Newton-Schulz: eight fast steps towards an orthogonal matrix, two that settle there.
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2


def schedule(train: TrainConfig, peak: float) -> optax.Schedule:
    """Linear warm-up to `peak`, then a cosine down to final_fraction of it at the last step."""
    warmup = min(train.warmup_steps, train.steps - 1)
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else peak, peak, warmup, train.steps, peak * train.final_fraction
    )


def optimizer(config: ModelConfig, train: TrainConfig) -> optax.GradientTransformation:
    """Updates for a flat {name: array} of trainable parameters; the gradient norm is clipped over all of them."""
    adamw = optax.adamw(
        schedule(train, train.learning_rate), b1=0.9, b2=0.95, eps=1e-20, weight_decay=train.weight_decay
    )
    specs = named_specs(config)
    labels = {
        name: "matrix" if train.optimizer == "muon" and spec.kind in MATRICES else "other"
        for name, spec in specs.items()
        if spec.trainable
    }
    matrix = stacked(
        muon(
            schedule(train, train.matrix_learning_rate),
            ns_coeffs=NEWTON_SCHULZ,
            ns_steps=len(NEWTON_SCHULZ),
            beta=0.95,
            nesterov=True,
            weight_decay=train.weight_decay,
            consistent_rms=0.18,
            muon_weight_dimension_numbers=_last_two,
        )
    )
    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm), optax.partition({"matrix": matrix, "other": adamw}, labels)
    )


def _last_two(params: Any) -> Any:
    return jax.tree.map(lambda _: MuonDimensionNumbers(reduction_axis=2, output_axis=1), params)


def stacked(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs `inner` on matrices of one shape as one [n, rows, columns] array.

    Newton-Schulz on hundreds of small matrices is bound by kernel launches; batched, it is a few large products.
    """

    def init(params: Any) -> optax.OptState:
        return inner.init(_group(params))

    def update(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Flat, optax.OptState]:
        grouped = None if params is None else _group(params)
        new, state = inner.update(_group(updates), state, grouped)
        return _ungroup(cast(Flat, new), updates), state

    return optax.GradientTransformation(init, update)


def _shape_groups(flat: Flat) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in sorted(name for name, leaf in flat.items() if not isinstance(leaf, optax.MaskedNode)):
        rows, columns = flat[name].shape[-2:]
        groups.setdefault(f"{rows}x{columns}", []).append(name)
    return groups


def _group(flat: Flat) -> Flat:
    return {
        shape: jnp.concatenate([flat[name].reshape(-1, *flat[name].shape[-2:]) for name in names])
        for shape, names in _shape_groups(flat).items()
    }


def _ungroup(grouped: Flat, like: Flat) -> Flat:
    out = dict(like)
    for shape, names in _shape_groups(like).items():
        begin = 0
        for name in names:
            count = like[name].size // (like[name].shape[-1] * like[name].shape[-2])
            out[name] = grouped[shape][begin : begin + count].reshape(like[name].shape)
            begin += count
    return out

"""One training step: gradients, optimiser, router biases."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from dsv4.config import Execution, ModelConfig, TrainConfig
from dsv4.model.handle import Model
from dsv4.model.init import init_params
from dsv4.training.loss import loss
from dsv4.training.optimizer import optimizer
from dsv4.training.tree import Flat, split, unflatten


class TrainState(NamedTuple):
    """Everything a checkpoint needs: step int32, float32 parameters, router biases and hash tables, optimiser state."""

    step: jax.Array
    trainable: Flat
    buffers: Flat
    optimizer: optax.OptState


def init_state(config: ModelConfig, train: TrainConfig) -> TrainState:
    """Step 0, with parameters drawn from `train.seed`."""
    trainable, buffers = split(config, init_params(config, jax.random.key(train.seed)))
    return TrainState(jnp.zeros((), jnp.int32), trainable, buffers, optimizer(config, train).init(trainable))


def model_of(state: TrainState, config: ModelConfig, execution: Execution) -> Model:
    """The model a state holds."""
    return Model(config, unflatten(config, {**state.trainable, **state.buffers}), execution)


def make_step(
    config: ModelConfig, train: TrainConfig, execution: Execution
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """A jitted `step(state, tokens [B, T+1], attend_all=False) -> (state, metrics)`; the old state is donated."""
    updater = optimizer(config, train)

    @functools.partial(jax.jit, donate_argnums=0, static_argnames="attend_all")
    def step(state: TrainState, tokens: jax.Array, attend_all: bool = False) -> tuple[TrainState, dict[str, Any]]:
        def objective(trainable: Flat) -> tuple[jax.Array, dict[str, Any]]:
            model = model_of(state._replace(trainable=trainable), config, execution)
            return loss(model, tokens, train, attend_all=attend_all)

        (total, parts), gradients = jax.value_and_grad(objective, has_aux=True)(state.trainable)
        # optax promotes dtypes and ranks implicitly, which our tests forbid everywhere else.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, optimizer_state = updater.update(gradients, state.optimizer, state.trainable)
        load = parts.pop("load")
        metrics = {
            "loss": total,
            **parts,
            "gradient_norm": optax.tree.norm(gradients),
            "max_load": jnp.max(jnp.stack([jnp.max(x) * x.shape[0] for x in load.values()])) if load else total * 0,
        }
        trainable = cast(Flat, optax.apply_updates(state.trainable, updates))
        buffers = balance_biases(state.buffers, load, train.bias_rate)
        return TrainState(state.step + 1, trainable, buffers, optimizer_state), metrics

    return step


def balance_biases(buffers: Flat, load: dict[str, jax.Array], rate: float) -> Flat:
    """Moves each router bias by +-rate toward an even load, without a gradient: up where an expert got too little."""
    moved = dict(buffers)
    for layer, share in load.items():
        name = f"{layer}.ffn.gate.bias"
        moved[name] = buffers[name] + rate * jnp.sign(jnp.mean(share) - share)
    return moved

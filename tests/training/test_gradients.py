"""Gradients reach what should move and are those of the loss; the optimiser treats each parameter by its class."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv4.config import Execution, TrainConfig, apply_overrides, load_config
from dsv4.model.handle import Model
from dsv4.model.init import balanced_table, init_params
from dsv4.training.loss import loss
from dsv4.training.optimizer import MATRICES, optimizer
from dsv4.training.step import balance_biases, init_state, make_step
from dsv4.training.tree import flatten, named_specs, split, unflatten

CONFIG = load_config("tiny").model
SPECS = named_specs(CONFIG)
TRAIN = TrainConfig(steps=8, batch=2, length=40, warmup_steps=1)
EXECUTION = Execution()


def draw() -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Fresh parameters with the zeros of the initialisation filled: a sink at 0 hides its own mistakes."""
    trainable, buffers = split(CONFIG, init_params(CONFIG, jax.random.key(1)))
    moved = {
        name: leaf + 0.1 * jax.random.normal(jax.random.key(i), leaf.shape)
        for i, (name, leaf) in enumerate(sorted(trainable.items()))
    }
    return moved, buffers


TRAINABLE, BUFFERS = draw()
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 41)), jnp.int32)


@partial(jax.jit, static_argnames=("config", "execution"))
def weighted_loss(trainable, weights, config=CONFIG, execution=EXECUTION):
    """The total loss with its weights (mtp, balance, indexer) as an argument, so that one program serves all tests."""
    model = Model(config, unflatten(CONFIG, {**trainable, **BUFFERS}), execution)
    _, parts = loss(model, TOKENS, TRAIN)
    return parts["next"] + weights[0] * parts["mtp"] + weights[1] * parts["balance"] + weights[2] * parts["indexer"]


gradients = jax.jit(jax.grad(weighted_loss), static_argnames=("config", "execution"))
# No choices to make: a short step then never changes which entries or experts are taken, and the loss is smooth.
SMOOTH = apply_overrides(CONFIG, [f"moe.per_token={CONFIG.moe.experts}", "indexer.top_k=1000"])
ALL = jnp.array([0.3, 1e-2, 1.0])


def test_every_trainable_leaf_gets_a_finite_gradient():
    got = gradients(TRAINABLE, ALL)
    assert set(got) == {name for name, spec in SPECS.items() if spec.trainable}
    for name, gradient in got.items():
        assert np.isfinite(gradient).all(), name
        assert np.abs(gradient).max() > 0, name


def test_each_loss_reaches_its_own_part_alone():
    """Without its KL the indexer gets no gradient at all; without its loss the MTP block gets none either."""
    none = gradients(TRAINABLE, jnp.zeros(3))
    for name, gradient in none.items():
        alone = ".indexer." in name or name.startswith("mtp.")
        assert (np.abs(gradient).max() == 0) == alone, name
    # The indexer's inputs carry no gradient: its loss moves nothing outside it.
    with_kl = gradients(TRAINABLE, jnp.array([0.0, 0.0, 1.0]))
    for name, gradient in with_kl.items():
        if ".indexer." not in name:
            np.testing.assert_allclose(gradient, none[name], atol=1e-6, err_msg=name)


KINDS = sorted({spec.kind for spec in SPECS.values() if spec.trainable})


@pytest.mark.parametrize("kind", KINDS)
def test_finite_differences(kind):
    """The slope along a random direction of all leaves of one class, but the indexer's: its scores also select."""
    weights = jnp.array([0.3, 0.0, 0.0])
    names = [name for name in TRAINABLE if SPECS[name].kind == kind and ".indexer." not in name]
    key = jax.random.key(KINDS.index(kind))
    direction = {
        name: jax.random.normal(jax.random.fold_in(key, i), TRAINABLE[name].shape) for i, name in enumerate(names)
    }
    norm = optax.tree.norm(direction)
    slope = sum(
        float(jnp.vdot(gradients(TRAINABLE, weights, config=SMOOTH)[name], direction[name])) for name in names
    )

    def shifted(step):
        moved = TRAINABLE | {name: TRAINABLE[name] + step / norm * direction[name] for name in names}
        return float(weighted_loss(moved, weights, config=SMOOTH))

    step = 2e-2
    measured = (8 * (shifted(step) - shifted(-step)) - (shifted(2 * step) - shifted(-2 * step))) / (12 * step)
    assert measured == pytest.approx(slope / float(norm), rel=0.05, abs=3e-4)


@pytest.mark.slow
def test_recomputing_blocks_changes_nothing():
    plain = gradients(TRAINABLE, ALL)
    again = gradients(TRAINABLE, ALL, execution=dataclasses.replace(EXECUTION, remat=True))
    for name in plain:
        np.testing.assert_allclose(plain[name], again[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_the_optimiser_follows_the_class_of_a_parameter():
    """Muon: every matrix but embedding and head, hc fn included; its update has an RMS of 0.18 times the rate."""
    train = dataclasses.replace(TRAIN, weight_decay=0.0, warmup_steps=0, clip_norm=1e9)
    updater = optimizer(CONFIG, train)
    noise = {name: jax.random.normal(jax.random.key(i), leaf.shape) for i, (name, leaf) in enumerate(TRAINABLE.items())}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, _ = jax.jit(updater.update)(noise, updater.init(TRAINABLE), TRAINABLE)
    assert not BUFFERS.keys() & updates.keys()
    for name, update in updates.items():
        rms = float(jnp.sqrt(jnp.mean(update**2)))
        if SPECS[name].kind in MATRICES:
            # An orthogonal [r, c] matrix has an RMS of max(r, c)^-0.5, which the rescaling undoes.
            assert rms == pytest.approx(0.18 * train.matrix_learning_rate, rel=0.1), name
            for matrix in update.reshape(-1, *update.shape[-2:]):
                singular = np.linalg.svd(matrix, compute_uv=False)
                assert singular.min() > 0.8 * singular.max(), name
        else:  # the first AdamW step is the sign of the gradient
            np.testing.assert_allclose(np.abs(update), train.learning_rate, rtol=1e-3, err_msg=name)


def test_router_biases_move_toward_balance():
    buffers = {"layers.3.ffn.gate.bias": jnp.zeros(4)}
    load = {"layers.3": jnp.array([0.4, 0.1, 0.25, 0.25])}
    moved = balance_biases(buffers, load, 1e-3)["layers.3.ffn.gate.bias"]
    np.testing.assert_allclose(moved, [-1e-3, 1e-3, 0, 0], atol=1e-9)


def test_training_learns_a_repeated_batch():
    step = make_step(CONFIG, TRAIN, EXECUTION)
    state = init_state(CONFIG, TRAIN)
    before = {name: np.asarray(leaf) for name, leaf in state.buffers.items()}
    losses = []
    for _ in range(TRAIN.steps):
        state, metrics = step(state, TOKENS)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
    assert int(state.step) == TRAIN.steps
    for name, buffer in state.buffers.items():
        if SPECS[name].kind == "hash":
            np.testing.assert_array_equal(buffer, before[name])
        else:
            assert 0 < np.abs(buffer).max() <= TRAIN.steps * TRAIN.bias_rate * 1.001, name


@pytest.mark.parametrize(("vocab", "k", "experts"), [(256, 2, 4), (512, 6, 256), (300, 3, 7)])
def test_hash_tables_are_balanced(vocab, k, experts):
    table = np.asarray(balanced_table(jax.random.key(0), vocab, k, experts))
    assert all(len(set(row)) == k for row in table.tolist())
    load = np.bincount(table.ravel(), minlength=experts)
    assert load.max() - load.min() <= 1


def test_flat_trees_nest_again():
    params = init_params(CONFIG, jax.random.key(0))
    assert jax.tree.structure(unflatten(CONFIG, flatten(CONFIG, params))) == jax.tree.structure(params)

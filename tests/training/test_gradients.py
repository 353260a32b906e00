"""Gradients reach what should move and are those of the loss; the optimiser treats each parameter by its class."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv4.config import Execution, TrainConfig, apply_overrides, load_config
from dsv4.model.handle import Model
from dsv4.model.init import balanced_table
from dsv4.model.moe import MoETrace
from dsv4.training.loss import balance, loss
from dsv4.training.optimizer import optimizer, stacked
from dsv4.training.step import balance_biases, init_state, make_step
from dsv4.training.tree import named_specs, unflatten

TINY = load_config("tiny").model
# No choices to make: a short step never changes which entries or experts are taken, and the loss is smooth.
SMOOTH = apply_overrides(TINY, [f"moe.per_token={TINY.moe.experts}", "indexer.top_k=1000"])
SPECS = named_specs(TINY)
TRAIN = TrainConfig(steps=10, batch=2, length=40, warmup_steps=0)
TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 41)).astype(np.int32)
# Compiling is what these tests spend their time on: the code need not be fast.
QUICK = {"xla_backend_optimization_level": "0"}
WEIGHTS = {"mtp_weight": 0.3, "balance_weight": 1e-2, "indexer_weight": 1.0}


def draw(config, seed=0):
    """(trainable, buffers) with nothing at its neutral value: a sink or a position bias of 0 hides mistakes."""
    rng = np.random.default_rng(seed)
    trainable, buffers = {}, {}
    for name, spec in named_specs(config).items():
        noise = rng.normal(size=spec.shape).astype(np.float32)
        match spec.kind:
            case "hash":
                noise = np.argsort(rng.random((spec.shape[0], config.moe.experts)))[:, : spec.shape[1]].astype(np.int32)
            case "norm" | "hyper_gain":
                noise = 1 + np.float32(0.3) * noise
            case "sink" | "position" | "embedding":
                pass
            case "bias":
                noise = np.float32(0.1) * noise
            case _:
                noise = noise * np.float32(spec.shape[-1] ** -0.5)
        (trainable if spec.trainable else buffers)[name] = noise
    return trainable, buffers


TRAINABLE, BUFFERS = draw(SMOOTH)
EXECUTION = Execution()


def gradient_program(config, execution=EXECUTION, attend_all=False):
    """((loss, parts), gradient) of (trainable, buffers, loss weights): weights as data serve all tests at once."""

    def total(trainable, buffers, weights):
        model = Model(config, unflatten(config, {**trainable, **buffers}), execution)
        return loss(model, jnp.asarray(TOKENS), SimpleNamespace(**weights), attend_all=attend_all)

    return jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=QUICK)


smooth = gradient_program(SMOOTH)


def gradient(**weights):
    return jax.device_get(smooth(TRAINABLE, BUFFERS, {**WEIGHTS, **weights})[1])


def test_the_total_is_the_weighted_sum_of_its_parts():
    (total, parts), _ = smooth(TRAINABLE, BUFFERS, WEIGHTS)
    assert set(parts) == {"next", "mtp", "balance", "indexer", "load"}
    want = parts["next"] + 0.3 * parts["mtp"] + 1e-2 * parts["balance"] + parts["indexer"]
    np.testing.assert_allclose(total, want, rtol=1e-6)
    assert parts["indexer"] > 0, "a KL"
    scored = ["layers.1", "layers.2", "layers.3", "mtp.0"]  # layer 0 takes its experts from the table
    assert sorted(parts["load"]) == scored
    for share in parts["load"].values():
        np.testing.assert_allclose(share, 1 / TINY.moe.experts, rtol=1e-6)  # every token takes every expert here


def test_every_trainable_leaf_gets_a_finite_gradient():
    got = gradient()
    assert set(got) == {name for name, spec in SPECS.items() if spec.trainable}
    for name, leaf in got.items():
        assert np.isfinite(leaf).all(), name
        assert np.abs(leaf).max() > 0, name
    for name, leaf in got.items():  # no expert and no head is left out
        if SPECS[name].kind in ("expert", "sink", "router"):
            assert np.all(np.abs(leaf).max(axis=tuple(range(1, leaf.ndim))) > 0), name


def test_each_loss_reaches_its_own_part_alone():
    """Without its KL the indexer gets no gradient at all; without its loss the MTP block gets none either."""
    none = gradient(mtp_weight=0.0, balance_weight=0.0, indexer_weight=0.0)
    for name, leaf in none.items():
        alone = ".indexer." in name or name.startswith("mtp.")
        assert (np.abs(leaf).max() == 0) == alone, name
    # The indexer's inputs and its target carry no gradient: its loss moves nothing outside it.
    with_kl = gradient(mtp_weight=0.0, balance_weight=0.0)
    for name, leaf in with_kl.items():
        assert (".indexer." in name) == (np.abs(leaf - none[name]).max() > 1e-6), name
    # Every expert has the same load in this model, so that its balance loss is at its least, and flat.
    balance_alone = gradient(mtp_weight=0.0, indexer_weight=0.0, balance_weight=1.0)
    for name, leaf in balance_alone.items():
        np.testing.assert_allclose(leaf, none[name], atol=1e-5, err_msg=name)


def test_the_balance_loss_lowers_the_scores_of_crowded_experts():
    """E * sum of load share times score share, sequence by sequence; 1 where either is even."""
    rng = np.random.default_rng(6)
    experts = np.array([[[0, 1], [0, 2], [0, 1]], [[0, 1], [2, 3], [1, 2]]], np.int32)
    scores = rng.random((2, 3, 4)).astype(np.float32) + 0.1

    def of(scores):
        return balance(MoETrace(jnp.asarray(experts), jnp.zeros((2, 3, 2)), scores))

    load = np.stack([np.bincount(row.ravel(), minlength=4) / 6 for row in experts])
    share = (scores / scores.sum(axis=-1, keepdims=True)).mean(axis=1)
    value, slope = jax.jit(jax.value_and_grad(of))(scores)
    np.testing.assert_allclose(value, 4 * np.mean(np.sum(load * share, axis=-1)), rtol=1e-5)
    np.testing.assert_allclose(of(np.ones_like(scores)), 1, rtol=1e-6)
    slope = np.asarray(slope)
    assert np.all(slope[0, :, 0] > 0) and np.all(slope[0, :, 3] < 0), "expert 0 has half of row 0, expert 3 nothing"


CLASSES = ["indexer", *sorted({spec.kind for spec in SPECS.values() if spec.trainable})]


@pytest.mark.parametrize("kind", CLASSES)
def test_finite_differences(kind):
    """The slope along a random direction of all leaves of one class.

    The indexer's are a class of their own: only they move its loss, whose target is held still.
    """
    weights = WEIGHTS | ({} if kind == "indexer" else {"indexer_weight": 0.0})
    names = [name for name in TRAINABLE if kind == ("indexer" if ".indexer." in name else SPECS[name].kind)]
    rng = np.random.default_rng(CLASSES.index(kind))
    whole = gradient(**weights)
    # Random, and leaning along the gradient enough for the slope to stand out from float32 noise.
    direction = {name: rng.normal(size=TRAINABLE[name].shape).astype(np.float32) for name in names}
    length, steep = norm_of(direction), norm_of({name: whole[name] for name in names})
    direction = {name: direction[name] / length + whole[name] / steep for name in names}
    slope = sum(np.vdot(whole[name], direction[name]) for name in names)

    def shifted(step):
        moved = TRAINABLE | {name: TRAINABLE[name] + np.float32(step) * direction[name] for name in names}
        return float(smooth(moved, BUFFERS, weights)[0][0])

    step = 1e-2
    measured = (8 * (shifted(step) - shifted(-step)) - (shifted(2 * step) - shifted(-2 * step))) / (12 * step)
    assert measured == pytest.approx(slope, rel=0.01, abs=1e-4)


def norm_of(tree):
    return np.float32(np.sqrt(sum(np.vdot(leaf, leaf) for leaf in tree.values())))


def test_the_dense_stage_attends_every_visible_entry():
    """attend_all is the sparse loss with a top_k that takes all, whatever top_k is; the indexer learns in both."""
    narrow, wide = (
        apply_overrides(TINY, ["layers=csa:4", "mtp_blocks=0", f"indexer.top_k={k}", "moe.hash_layers=0"])
        for k in (2, 1000)
    )

    @functools.partial(jax.jit, compiler_options=QUICK)
    def every(trainable, buffers):
        def parts(config, attend_all):
            model = Model(config, unflatten(config, {**trainable, **buffers}), EXECUTION)
            return loss(model, jnp.asarray(TOKENS), TRAIN, attend_all=attend_all)[1]

        return parts(narrow, True), parts(narrow, False), parts(wide, False)

    dense, sparse, unlimited = jax.device_get(every(*draw(narrow)))
    np.testing.assert_allclose(unlimited["next"], dense["next"], rtol=1e-6)
    np.testing.assert_allclose(unlimited["indexer"], dense["indexer"], rtol=1e-5)
    assert abs(sparse["next"] - dense["next"]) > 1e-4
    assert min(dense["indexer"], sparse["indexer"]) > 0


@pytest.mark.slow
def test_recomputing_blocks_changes_nothing():
    plain = gradient()
    _, again = gradient_program(SMOOTH, Execution(remat=True))(TRAINABLE, BUFFERS, WEIGHTS)
    for name in plain:
        np.testing.assert_allclose(plain[name], again[name], rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("attend_all", [False, True])
def test_gradients_of_the_real_choices(attend_all):
    """Top-2 of 4 experts and the 4 best entries, as trained: finite everywhere, and the indexer gets its own."""
    _, got = gradient_program(TINY, attend_all=attend_all)(*draw(TINY), WEIGHTS)
    for name, leaf in got.items():
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, name


# As in DeepSeek-V4. Everything else that is trainable is AdamW's.
MUON = {"dense", "expert", "projection", "router", "hyper"}


@functools.cache
def updates_of():
    """(jitted update, initial state): the gradient norm is not clipped unless a test says so."""
    transformation = optimizer(SMOOTH, TRAIN)

    def update(gradients, state, params):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return transformation.update(gradients, state, params)

    return jax.jit(update, compiler_options=QUICK), jax.jit(transformation.init)(TRAINABLE)


def newton_schulz(matrix):
    """Eight fast steps and two that settle, of one matrix, in float64."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x.astype(np.float64) / np.linalg.norm(x)
    for a, b, c in [(3.4445, -4.7750, 2.0315)] * 8 + [(2, -1.5, 0.5)] * 2:
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def test_the_first_update_of_every_class():
    """Muon on each single matrix, stacked experts and hc fn included; AdamW on the rest; buffers get none."""
    rng = np.random.default_rng(3)
    noise = {name: rng.normal(size=leaf.shape).astype(np.float32) * 1e-3 for name, leaf in TRAINABLE.items()}
    assert norm_of(noise) < TRAIN.clip_norm
    update, state = updates_of()
    updates, _ = jax.device_get(update(noise, state, TRAINABLE))
    assert set(updates) == set(TRAINABLE) and not set(updates) & set(BUFFERS)
    for name, got in updates.items():
        rate = TRAIN.matrix_learning_rate if SPECS[name].kind in MUON else TRAIN.learning_rate
        got = -got / rate - TRAIN.weight_decay * TRAINABLE[name]  # both decay by rate * 0.1 * parameter
        if SPECS[name].kind in MUON:
            rows, columns = got.shape[-2:]
            for matrix, drawn in zip(
                got.reshape(-1, rows, columns), noise[name].reshape(-1, rows, columns), strict=True
            ):
                want = 0.18 * max(rows, columns) ** 0.5 * newton_schulz(drawn)
                np.testing.assert_allclose(matrix, want, atol=1e-3, err_msg=name)
                assert np.sqrt(np.mean(matrix**2)) == pytest.approx(0.18, rel=0.05), name
        else:  # the first step of Adam, bias-corrected, is the sign: eps is 1e-20, far below any gradient
            np.testing.assert_allclose(got, np.sign(noise[name]), atol=2e-3, err_msg=name)


def test_the_gradient_norm_is_clipped_over_all_parameters_together():
    """Adam's second moment shows it: a gradient 1000 times as large leaves one of norm clip_norm."""
    update, state = updates_of()
    rng = np.random.default_rng(4)
    noise = {name: rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in TRAINABLE.items()}
    norm = norm_of(noise)
    assert norm > 2 * TRAIN.clip_norm
    _, clipped = update(noise, state, TRAINABLE)
    _, same = update({name: leaf / norm * TRAIN.clip_norm for name, leaf in noise.items()}, state, TRAINABLE)
    for mine, theirs in zip(jax.tree.leaves(clipped), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-12)


def test_matrices_stacked_by_shape_keep_apart():
    """Two names of one shape, a stack of experts of that shape, and another shape: each is transformed by itself."""

    def each(update, param):
        return update / jnp.linalg.norm(update, axis=(-2, -1), keepdims=True) + param

    alone = optax.stateless(lambda updates, params: jax.tree.map(each, updates, params))
    rng = np.random.default_rng(5)
    shapes = {"b": (3, 4), "a": (5, 3, 4), "c": (3, 4), "d": (4, 3), "e": (2, 4, 3)}
    updates, params = ({name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()} for _ in range(2))
    transformation = stacked(alone)
    got, _ = transformation.update(updates, transformation.init(params), params)
    want = jax.tree.map(each, updates, params)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6, err_msg=name)


def test_router_biases_move_toward_balance():
    """By the rate and no more, up where an expert got too little; others, and even ones, stay."""
    buffers = {"layers.3.ffn.gate.bias": jnp.full(4, 0.5), "mtp.0.ffn.gate.bias": jnp.zeros(4)}
    load = {"layers.3": jnp.array([0.4, 0.1, 0.25, 0.25])}
    moved = balance_biases(buffers, load, 1e-3)
    np.testing.assert_allclose(moved["layers.3.ffn.gate.bias"], [0.499, 0.501, 0.5, 0.5], atol=1e-7)
    np.testing.assert_array_equal(moved["mtp.0.ffn.gate.bias"], 0)


def test_training_learns_a_repeated_batch():
    """Gradients, optimiser and biases together; without the fused program of `make_step`, which a slow test takes."""
    update, state = updates_of()
    trainable, buffers, losses = dict(TRAINABLE), dict(BUFFERS), []
    for _ in range(6):
        (total, parts), grads = smooth(trainable, buffers, WEIGHTS)
        updates, state = update(grads, state, trainable)
        trainable = jax.tree.map(lambda leaf, change: leaf + np.asarray(change), trainable, jax.device_get(updates))
        buffers = balance_biases(buffers, parts["load"], TRAIN.bias_rate)
        losses.append(float(total))
    assert losses[-1] < losses[0] - 1 and all(np.isfinite(losses))


@pytest.mark.slow
def test_the_training_step():
    train = dataclasses.replace(TRAIN, steps=8, warmup_steps=1)
    step, state = make_step(TINY, train, EXECUTION), init_state(TINY, train)
    before = {name: np.asarray(leaf) for name, leaf in state.buffers.items()}
    losses = []
    for _ in range(train.steps):
        state, metrics = step(state, jnp.asarray(TOKENS))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
    assert int(state.step) == train.steps
    for name, buffer in state.buffers.items():
        if SPECS[name].kind == "hash":
            np.testing.assert_array_equal(buffer, before[name])
        else:
            assert 0 < np.abs(buffer).max() <= train.steps * train.bias_rate * 1.001, name


def test_hash_tables_are_balanced():
    """Every expert gets the same share of the vocabulary, to within one token; no token the same expert twice."""
    make = jax.jit(balanced_table, static_argnums=(1, 2, 3))
    for vocab, k, experts in ((300, 2, 4), (300, 3, 7)):
        table = np.asarray(make(jax.random.key(0), vocab, k, experts))
        assert table.shape == (vocab, k) and table.dtype == np.int32
        assert all(len(set(row)) == k for row in table.tolist())
        load = np.bincount(table.ravel(), minlength=experts)
        assert load.max() - load.min() <= 1
        assert len({tuple(row) for row in table[:8].tolist()}) > 1, "drawn, not the same for neighbours"

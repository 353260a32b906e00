"""A small model under recipes, end to end."""

import dataclasses

import jax
import numpy as np
import pytest

import dsv4
from dsv4.config import CACHE_FORMATS, ConfigError, apply_overrides, find_recipe, load_config
from dsv4.cost import bytes_per_token
from dsv4.decoding.inputs import InputError
from dsv4.evaluate import run
from dsv4.evaluate.compare import full_pass
from dsv4.evaluate.greedy import continuation
from dsv4.evaluate.plot import plot
from dsv4.evaluate.run import AS_STORED, batch_size, evaluate, evaluate_as_stored
from dsv4.evaluate.settings import Settings
from dsv4.quantize.weights import quantize_model
from dsv4.training.data import eval_windows
from dsv4.training.held_out import held_out_bits

SETTINGS = Settings(windows=3, length=32, prompts=2, prompt_tokens=8, new_tokens=5, resamples=2000)
CONFIG = apply_overrides(
    load_config("tiny").model,
    ["layers=csa:4", "residual.kind=plain", "residual.streams=1", "mtp_blocks=0", "moe.hash_layers=0"],
)
WINDOWS = eval_windows(np.random.default_rng(0).integers(2, 320, 97).astype(np.uint16), 32, 32, np.full(320, 3))


@pytest.fixture(scope="module")
def model():
    return dsv4.init(CONFIG, seed=1)


@pytest.fixture(scope="module")
def reports():
    return []


@pytest.fixture(scope="module", autouse=True)
def batches_of_two():
    """So that the second is filled up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "LOGIT_BYTES", 4 * 32 * 320 * 2)
        yield


@pytest.fixture(scope="module")
def rows(model, reports):
    return evaluate(model, [find_recipe("fp8")], WINDOWS, SETTINGS, lambda *done: reports.append(done))


def test_the_baseline_is_itself(rows, model):
    row = rows[0]
    assert row.recipe == "bf16"
    for name in ("bits_ratio", "top1", "greedy_equal", "index_overlap"):
        assert dataclasses.astuple(getattr(row, name)) == (1, 1, 1), name
    assert dataclasses.astuple(row.kl) == (0, 0, 0) and row.divergence_median.value == SETTINGS.new_tokens
    expected = held_out_bits(quantize_model(model, find_recipe("bf16")), WINDOWS, 2)
    assert row.bits_per_byte.value == pytest.approx(expected, rel=1e-6)


def test_a_recipe_costs_and_saves(rows, model):
    base, row = rows
    assert row.recipe == "fp8"
    assert row.kl.low > 0 and 0 < row.top1.value <= 1 and 0.5 < row.index_overlap.value < 1
    assert row.bits_ratio.value == pytest.approx(row.bits_per_byte.value / base.bits_per_byte.value)
    quantised = quantize_model(model, find_recipe("fp8"))
    assert row.weight_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(quantised.params)) < base.weight_bytes
    assert (row.cache_bytes, base.cache_bytes) == tuple(
        bytes_per_token(CONFIG, CACHE_FORMATS[name]) for name in ("fp8", "bf16")
    )


def test_the_same_again(rows, model):
    assert evaluate(model, [find_recipe("fp8")], WINDOWS, SETTINGS) == rows


def test_progress_reaches_its_end(rows, reports):
    assert reports == [(i, 6) for i in range(1, 7)]  # 2 variants, 2 batches and their continuations


def test_greedy_tokens_are_the_most_likely_ones(rows, model):
    """Through the cache or all at once: every token is what the tokens before it make most likely."""
    quantised = quantize_model(model, find_recipe("fp8"))
    prompts = WINDOWS.tokens[[0, 2], :8]  # as evaluate takes them
    found = continuation(quantised, prompts, 5)
    text = np.pad(np.concatenate([prompts, found], axis=1), ((0, 0), (0, 32 - 13)))
    logits, _ = full_pass(quantised, text)
    np.testing.assert_array_equal(found, np.argmax(logits, axis=-1)[:, 7:12])


def test_a_quantised_model_is_measured_as_stored(rows, model):
    quantised = quantize_model(model, find_recipe("fp8"))
    with pytest.raises(ConfigError, match="is quantised already"):
        evaluate(quantised, [find_recipe("int8")], WINDOWS, SETTINGS)
    row = evaluate_as_stored(quantised, WINDOWS, SETTINGS)
    assert row.recipe == AS_STORED and row.kl is None and row.bits_ratio is None and row.greedy_equal is None
    assert row.bits_per_byte == rows[1].bits_per_byte and row.weight_bytes == rows[1].weight_bytes


def test_what_does_not_fit_the_context(model):
    with pytest.raises(InputError, match="600 new tokens do not fit"):
        evaluate(model, [], WINDOWS, dataclasses.replace(SETTINGS, new_tokens=600))


@pytest.mark.parametrize("field", ["windows", "length", "new_tokens", "prompt_tokens"])
def test_settings_out_of_range(field):
    with pytest.raises(ConfigError, match=f"{field} is 0: it must be at least 1"):
        Settings(**{field: 0})


def test_the_memory_of_logits_is_bounded():
    assert batch_size(WINDOWS, 100) == len(WINDOWS) and batch_size(WINDOWS, 320) == 2
    assert batch_size(WINDOWS, run.LOGIT_BYTES) == 1


def test_the_figure(rows, tmp_path):
    plot(rows, tmp_path / "figure.png", "a title")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")

"""Statistics against the inputs themselves, scales against brute force, and a conversion that uses them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4
from dsv4.checkpoint.agreement import flatten
from dsv4.config import RECIPES, ConfigError, Execution
from dsv4.decoding.inputs import InputError
from dsv4.parameters import tensor_name
from dsv4.quantize import observe as observing
from dsv4.quantize.calibrate import calibrate, load_calibration, save_calibration, windows_of
from dsv4.quantize.convert import quantize_checkpoint
from dsv4.quantize.observe import BINS, Statistics, bin_edges, observe_inputs
from dsv4.quantize.plan import CalibrationRequest
from dsv4.quantize.static_scale import input_scale
from dsv4.quantize.weights import largest_channels, quantize_model
from pallas_kernels.formats import FORMATS
from pallas_kernels.quant import TreatedWeight, dequantize, observe, quantize
from pallas_kernels.quant.hadamard import rotate_blocks

SAMPLES = np.random.default_rng(1).standard_t(4, (400, 64)).astype(np.float32)
ROW_FORMATS = ["fp8_row", "int8_row"]


@jax.jit
def all_inputs(model, ids):
    with observe() as seen:
        module = model.bind()
        trace = module(ids, jnp.full(1, ids.shape[1], jnp.int32), None)[2]
        module.predict_next(trace.layers[-1].streams[:, :-1], ids[:, 1:])
    return {name: x.reshape(-1, x.shape[-1]) for name, x in seen}


@pytest.fixture(scope="module")
def inputs(model, windows):
    """Weight -> its inputs over all windows, rows [n, in]: what the statistics must not need to keep."""
    observed = model.replace(params=observing._observed(model), execution=Execution())
    found = [all_inputs(observed, window[None]) for window in windows]
    return {name: np.concatenate([each[name] for each in found]) for name in found[0]}


def statistics_of(x):
    bins = np.abs(x).astype(np.float32).view(np.uint32).reshape(-1) >> 20
    return Statistics(np.abs(x).max(0), np.bincount(bins, minlength=BINS), float(np.abs(x).max()))


def test_statistics_are_those_of_the_inputs(model, windows, inputs):
    seen = observe_inputs(model, windows)
    names = {tensor_name(path) for path, leaf in flatten(model.params).items() if _is_linear(path)}
    assert seen.keys() == inputs.keys() == names
    for name, found in seen.items():
        expected = statistics_of(inputs[name])
        np.testing.assert_allclose(found.channel_amax, expected.channel_amax, rtol=1e-4, err_msg=name)
        assert found.histogram.sum() == expected.histogram.sum()
        # Another program rounds otherwise: a value may fall into the next bin.
        assert np.abs(np.cumsum(found.histogram) - np.cumsum(expected.histogram)).max() <= 3
        assert found.amax == pytest.approx(expected.amax, rel=1e-4)


def _is_linear(path):
    dense = ("wq_a", "wq_b", "wo_a", "wo_b", "w1", "w2", "w3", "e_proj", "h_proj")
    return path[-1] == "weight" and (path[-2] in dense or path[-3:-1] == ("attn", "wkv"))


def test_statistics_of_treated_inputs(model, windows, inputs):
    name, first = "layers.0.attn.wq_a.weight", windows[:1]
    seen = observe_inputs(model, first, channels={name: np.array([3, 7])}, rotate=True)
    rows = inputs[name][: windows.shape[1]].copy()
    np.testing.assert_allclose(seen[name].channel_amax, np.abs(rows).max(0), rtol=1e-4)
    rows[:, [3, 7]] = 0
    rotated = np.abs(np.asarray(rotate_blocks(jnp.asarray(rows))))
    assert seen[name].amax == pytest.approx(rotated.max(), rel=1e-4)


def test_an_input_that_is_not_finite_is_named(model, windows):
    params = jax.tree.map(lambda leaf: leaf, model.params)
    params["layers"][1]["attn_norm"]["weight"] = jnp.full(32, jnp.inf, jnp.bfloat16)
    with pytest.raises(ConfigError, match=r"calibration: the input of layers.1.attn.\S+ is not finite"):
        observe_inputs(model.replace(params=params), windows[:1])


def test_bins_are_eighths_of_octaves():
    edges = bin_edges()
    one = np.searchsorted(edges, 1.0)
    np.testing.assert_array_equal(edges[one : one + 9], 1 + np.arange(9) / 8)
    assert edges[-1] == 2.0**128 and np.all(np.diff(edges) > 0)


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_absmax_is_the_scale_that_would_be_computed(name):
    expected = quantize(jnp.asarray(SAMPLES), dataclasses.replace(FORMATS[name], tile=(None, None))).scale
    assert input_scale(statistics_of(SAMPLES), FORMATS[name], "absmax") == float(expected[0, 0])


@pytest.mark.parametrize("percentile", [50, 99, 99.99, 100])
def test_percentile_is_within_a_bin(percentile):
    scale = input_scale(statistics_of(SAMPLES), FORMATS["int8_row"], "percentile", percentile=percentile)
    exact = np.percentile(np.abs(SAMPLES), percentile)
    assert exact * (1 - 1e-6) <= scale * 127 <= exact * 1.13


@functools.partial(jax.jit, static_argnums=2)
def squared_error(x, scale, form):
    static = dataclasses.replace(form, tile=(None, None))
    return jnp.mean((dequantize(quantize(x, static, scale=scale[None, None])) - x) ** 2)


@pytest.mark.parametrize("name", ROW_FORMATS)
@pytest.mark.parametrize("outlier", [1.0, 40.0])
def test_mse_is_about_the_best_there_is(name, outlier):
    x = SAMPLES.copy()
    x[0, 0] *= outlier
    form, statistics = FORMATS[name], statistics_of(x)
    largest = np.abs(x).max() / form.largest
    errors = [float(squared_error(x, jnp.float32(largest * 2.0 ** (-k / 16)), form)) for k in range(160)]
    chosen = {
        method: float(squared_error(x, jnp.float32(input_scale(statistics, form, method)), form))
        for method in ("absmax", "mse")
    }
    assert chosen["mse"] <= min(errors) * 1.05 and chosen["mse"] <= chosen["absmax"] * 1.001
    if name == "int8_row" and outlier > 1:
        assert chosen["mse"] < 0.95 * chosen["absmax"]


@pytest.mark.parametrize("method", ["absmax", "percentile", "mse"])
@pytest.mark.parametrize("value", [0.0, 1e-42, 3e38])
def test_extreme_inputs_have_a_scale_that_works(method, value):
    scale = np.float32(input_scale(statistics_of(np.full((2, 4), value, np.float32)), FORMATS["int8_row"], method))
    assert np.isfinite(scale) and scale >= np.finfo(np.float32).tiny
    assert value < 1 or 0.9 < scale * np.float64(127) / value < 1.13


def test_calibration_survives_a_file(model, windows, tmp_path):
    found = calibrate(model, windows[:1], RECIPES["int8"])
    save_calibration(found, tmp_path / "kept.npz")
    back = load_calibration(tmp_path / "kept.npz")
    assert back.keys() == found.keys()
    for name, weight in found.items():
        assert back[name].input_scale == weight.input_scale
        assert (weight.input_scale is None) == name.endswith("wo_a.weight")
        np.testing.assert_array_equal(back[name].channel_amax, weight.channel_amax)


def test_windows_are_whole_and_spread_and_begin_as_texts_do(tools):
    config = tools.CONFIG
    windows = windows_of(config, list(range(1, 200)), "text")
    assert windows.shape == (6, 32) and (windows[:, 0] == config.bos_id).all()
    np.testing.assert_array_equal(windows[:, 1:].reshape(-1), np.arange(1, 187))
    many = windows_of(config, list(range(31 * 640)), "text")
    assert many.shape == (64, 32) and many[0, 1] == 0 and many[-1, -1] == 31 * 640 - 1
    with pytest.raises(InputError, match="text has 30 tokens: calibration needs at least 31"):
        windows_of(config, list(range(30)), "text")


@pytest.fixture
def tokens(monkeypatch, windows):
    """The model of these tests has no tokenizer: its text is `windows`."""
    monkeypatch.setattr("dsv4.quantize.plan.text_windows", lambda *_: windows)


@pytest.mark.parametrize("name", ["int8", pytest.param("fp8_per_tensor", marks=pytest.mark.slow)])
def test_a_calibrated_checkpoint(name, model, source, windows, inputs, tokens, tools, tmp_path):
    """Scales are stored with the weights, `wo_a` excepted, and the model, made of noise, still runs."""
    (tmp_path / "text").write_text("words")
    recipe = dataclasses.replace(RECIPES[name], outlier_channels=2)
    request = CalibrationRequest(tmp_path / "text", "absmax")
    report = quantize_checkpoint(source, tmp_path / "out", recipe, calibration=request)
    loaded = dsv4.load(tmp_path / "out")
    assert loaded.config.storage.static_activations and "static_activations true" in report.beyond_released[-1]
    for path, leaf in flatten(loaded.params).items():
        if not isinstance(leaf, TreatedWeight):
            continue
        found, rows = tensor_name(path), inputs[tensor_name(path)].copy()
        np.testing.assert_array_equal(leaf.channels, largest_channels(np.abs(rows).max(0), 2))
        rows[:, np.asarray(leaf.channels)] = 0
        if path[-2] == "wo_a":
            assert leaf.input_scale is None
        else:
            expected = np.abs(rows).max() / recipe.activations.largest
            assert float(leaf.input_scale[0, 0]) == pytest.approx(expected, rel=1e-3), found
    exact = dsv4.forward(model, windows[:1])
    error = np.asarray(dsv4.forward(loaded, windows[:1]) - exact)
    assert np.sqrt(np.mean(error**2)) < 0.3 * float(exact.std())
    again, found = tmp_path / "again", calibrate(model, windows, recipe)
    tools.export_quietly(quantize_model(model, recipe, found), again)
    assert tools.content(again) == tools.content(tmp_path / "out")


def test_block_scales_stay_dynamic_and_only_outliers_are_calibrated(source, inputs, tokens, tmp_path):
    (tmp_path / "text").write_text("words")
    recipe = dataclasses.replace(RECIPES["fp8"], outlier_channels=2)
    quantize_checkpoint(source, tmp_path / "out", recipe, calibration=CalibrationRequest(tmp_path / "text"))
    loaded = dsv4.load(tmp_path / "out")
    weight = loaded.params["layers"][1]["attn"]["wq_b"]["weight"]
    assert weight.input_scale is None and not loaded.config.storage.static_activations
    amax = np.abs(inputs["layers.1.attn.wq_b.weight"]).max(0)
    np.testing.assert_array_equal(weight.channels, largest_channels(amax, 2))


def test_an_interrupted_calibrated_run_keeps_its_numbers(source, tokens, tools, tmp_path, monkeypatch):
    (tmp_path / "text").write_text("words")
    request, out = CalibrationRequest(tmp_path / "text"), tmp_path / "out"

    def stop(what, done, total):
        if what == "quantising" and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, out, RECIPES["int8"], calibration=request, progress=stop)
    with monkeypatch.context() as patch:
        patch.setattr("dsv4.quantize.convert.calibrate", lambda *_, **__: pytest.fail("calibrated twice"))
        quantize_checkpoint(source, out, RECIPES["int8"], calibration=request)
    quantize_checkpoint(source, tmp_path / "whole", RECIPES["int8"], calibration=request)
    assert tools.content(out) == tools.content(tmp_path / "whole")

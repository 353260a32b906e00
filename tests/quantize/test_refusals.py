"""What cannot be converted is one error that names it, and leaves nothing behind."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import dsv4
from dsv4 import checkpoint
from dsv4.checkpoint import CheckpointError
from dsv4.config import RECIPES, ConfigError, apply_overrides
from dsv4.decoding.inputs import InputError
from dsv4.parameters import nest
from dsv4.quantize.convert import quantize_checkpoint
from dsv4.quantize.plan import CalibrationRequest, awkward_shapes, make_plan
from dsv4.quantize.source import open_source
from pallas_kernels.formats import QuantFormat


def refused(error, match, source, destination, recipe, **options):
    with pytest.raises(error, match=match) as caught:
        quantize_checkpoint(source, destination, recipe, **options)
    return str(caught.value)


def test_a_tile_that_does_not_divide(source, tools, tmp_path):
    odd = dataclasses.replace(RECIPES["fp8"], experts=QuantFormat("e4m3", (1, 24)))
    match = r"layers.0.ffn.experts.w1.weight cannot be e4m3:1x24:float32: tiles of 1 x 24 do not divide"
    refused(ConfigError, match, source, tmp_path / "out", odd)
    assert tools.nothing_at(tmp_path / "out")


def test_a_recipe_that_does_nothing(source, tmp_path):
    refused(ConfigError, "recipe 'bf16' quantises nothing", source, tmp_path / "out", RECIPES["bf16"])


@pytest.mark.parametrize("recipe", ["fp8", "int8"])
def test_a_checkpoint_that_is_quantised_already(oracle, tools, tmp_path, recipe):
    case = oracle / "ckpt" / "mixed_fp8fp4"
    changed = dataclasses.replace(RECIPES[recipe], outlier_channels=2)
    match = r"is quantised already \(layers.0.attn.wq_a.weight is e4m3:128x128:ue8m0\)"
    refused(ConfigError, match, case, tmp_path / "out", changed)
    assert tools.nothing_at(tmp_path / "out")


def test_places_that_are_taken(source, tmp_path):
    (tmp_path / "mine").write_text("mine")
    refused(CheckpointError, "exists and is not empty", source, tmp_path, RECIPES["fp8"])
    refused(CheckpointError, "is a file", source, tmp_path / "mine", RECIPES["fp8"])
    refused(ConfigError, "is the checkpoint to read", source, source.parent / "." / source.name, RECIPES["fp8"])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_sources_that_are_none(source, tmp_path):
    refused(ConfigError, "no checkpoint 'nowhere'.*small", "nowhere", tmp_path / "out", RECIPES["fp8"])
    refused(CheckpointError, "no config.json", tmp_path, tmp_path / "out", RECIPES["fp8"])


def test_a_source_with_a_weight_that_is_not_finite(model, tools, tmp_path):
    """Found when its leaf is read: it would be found again, so nothing unfinished is kept."""
    params = checkpoint.agreement.flatten(model.params)
    broken = dict(params) | {("norm", "weight"): np.full(32, np.inf, jnp.bfloat16)}
    checkpoint.save(model.replace(params=nest(broken.items())), tmp_path / "source")
    match = r"norm.weight\[0\] is inf"
    refused(CheckpointError, match, tmp_path / "source", tmp_path / "out", RECIPES["fp8"])
    assert tools.nothing_at(tmp_path / "out")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("router=fp8", "Recipe has no field 'router'"),
        ("expert=fp8", "did you mean 'experts'?"),
        ("dense=fp7", "dense is 'fp7'"),
        ("activations=fp8_tensor", "a tile must lie in one row"),
        ("outlier_channels=-1", "outlier_channels is -1"),
    ],
)
def test_fields_of_a_recipe(override, message):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(RECIPES["fp8"], [override])
    assert message in str(caught.value)


@pytest.fixture
def text(tmp_path):
    def write(content):
        path = tmp_path / "text"
        path.write_bytes(content)
        return CalibrationRequest(path)

    return write


@pytest.mark.parametrize("name", ["released", "fp8", "fp8_e5m2", "mxfp4_experts"])
def test_calibration_without_an_effect(name, source, text, tmp_path):
    match = "calibration would change nothing: activations are .*outlier_channels is 0"
    refused(ConfigError, match, source, tmp_path / "out", RECIPES[name], calibration=text(b"words"))


def test_texts_that_cannot_be_used(text, tools, tmp_path):
    out, recipe = tmp_path / "out", RECIPES["int8"]
    refused(InputError, "is not UTF-8 text", "small", out, recipe, calibration=text(b"\xff\xfe"))
    match = r"text has \d+ tokens: calibration needs at least 511, one window"
    refused(InputError, match, "small", out, recipe, calibration=text(b"In the beginning"))
    refused(InputError, "has 0 tokens", "small", out, recipe, calibration=text(b""))
    absent = CalibrationRequest(tmp_path / "absent")
    refused(FileNotFoundError, "absent", "small", out, recipe, calibration=absent)
    assert tools.nothing_at(out)


def test_a_model_without_a_tokenizer_cannot_read(source, text, tmp_path):
    refused(InputError, "has no tokenizer", source, tmp_path / "out", RECIPES["int8"], calibration=text(b"words"))


def test_shapes_that_others_get_wrong_are_named(tools, tmp_path):
    attention = dataclasses.replace(tools.CONFIG.attention, q_lora_rank=160)
    config = dataclasses.replace(tools.CONFIG, attention=attention)
    checkpoint.export(dsv4.init(config), tmp_path / "source")
    plan = make_plan(open_source(tmp_path / "source"), tmp_path / "out", RECIPES["released"], None)
    named = {text.split()[0] for text in awkward_shapes(plan.leaves)}
    assert "layers.0.attn.wq_a.weight" in named and "layers.1.attn.indexer.wq_b.weight" in named
    assert not any("wkv" in name or "experts" in name for name in named)
    plan = make_plan(open_source(tmp_path / "source"), tmp_path / "out", RECIPES["int8"], None)
    assert awkward_shapes(plan.leaves) == []

"""Dotted overrides: typed, in any order, validated once."""

import itertools
import operator

import pytest

from dsv4.config import ConfigError, Execution, LayerConfig, TrainConfig, apply_overrides, load_config, replace
from dsv4.config.cache import CacheFormat
from dsv4.config.layers import parse_layers, released_layer
from pallas_kernels.formats import FP8_GROUP

TINY = load_config("tiny")


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.residual.kind=plain", "model.residual.streams=1"),
        ("model.moe.experts=0", "model.moe.hash_layers=0", "train.steps=7"),
        ("model.moe.experts=1", "model.moe.per_token=1", "model.layers=csa:4"),
        ("model.attention.rope_dim=32", "model.attention.head_dim=32", "model.indexer.head_dim=32"),
        ("model.storage.experts=fp4", "model.storage.dense=fp8"),
    ],
)
def test_overrides_that_need_each_other_work_in_any_order(overrides):
    results = [apply_overrides(TINY, order) for order in itertools.permutations(overrides)]
    assert all(result == results[0] != TINY for result in results)


def test_together_they_are_still_validated():
    with pytest.raises(ConfigError, match="residual.streams is 4: plain means 1"):
        apply_overrides(TINY, ["model.residual.kind=plain", "train.steps=3"])


def test_of_two_for_one_field_the_later_one_counts():
    assert apply_overrides(TINY, ["model.width=3", "model.width=48"]).model.width == 48
    assert apply_overrides(TINY, ["model.width=0", "model.width=48"]).model.width == 48
    off = apply_overrides(TINY, ["model.attention.yarn.factor=8", "model.attention.yarn=none"])
    assert off.model.attention.yarn is None
    with pytest.raises(ConfigError, match="model.attention.yarn is None: it has no field 'factor'"):
        apply_overrides(TINY, ["model.attention.yarn=none", "model.attention.yarn.factor=8"])


def test_no_override_changes_nothing():
    assert apply_overrides(TINY, []) == TINY
    assert replace(TINY, "model.width", TINY.model.width) == TINY


@pytest.mark.parametrize(
    ("config", "path", "text", "value"),
    [
        (TrainConfig(), "steps", "1e4", 10000),
        (TrainConfig(), "learning_rate", "1", 1.0),
        (TrainConfig(), "optimizer", "adamw", "adamw"),
        (Execution(), "remat", "true", True),
        (Execution(), "cache", "fp8_fp4_index", CacheFormat("fp8", "fp8", "fp4")),
        (Execution(cache=CacheFormat()), "cache", "None", None),
        (Execution(cache=CacheFormat()), "cache.index", "fp4", "fp4"),
        (Execution(), "activations", "fp8_group", FP8_GROUP),
        (Execution(), "implementation", "reference", "reference"),
    ],
)
def test_text_is_read_as_the_type_of_the_field(config, path, text, value):
    read = operator.attrgetter(path)
    found = read(apply_overrides(config, [f" {path} = {text} "]))
    assert found == value and type(found) is type(value)
    assert read(replace(config, path, value)) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.optimizer=adam", "train.optimizer is 'adam': muon or adamw"),
        ("model.moe.scoring=relu", "model.moe.scoring is 'relu': sqrtsoftplus, softmax or sigmoid"),
        ("model.residual.kind=1", "model.residual.kind is '1': hyper or plain"),
        ("model.moe.normalize=1", "model.moe.normalize is '1': expected bool"),
        ("model.width=wide", "model.width is 'wide': expected int"),
        ("model.width=16.5", "expected int"),
        ("model.width=true", "expected int"),
        ("model.norm_eps=true", "expected float"),
        ("model.attention.yarn=16", "model.attention.yarn is '16': expected YarnConfig or None"),
        ("model.attention=3", "expected AttentionConfig"),
        ("model.widht=3", "ModelConfig has no field 'widht'; did you mean 'width'?"),
        ("model.zzz=3", "ModelConfig has no field 'zzz'; it has layers, vocab_size"),
        ("modle.width=3", "did you mean 'model'?"),
        ("model.width.bits=3", "model.width is 32: it has no field 'bits'"),
        ("model.layers.kind=csa", "it has no field 'kind'"),
        ("model.width", "override 'model.width': write it as field.name=value"),
        ("=3", "override '=3': write it as field.name=value"),
        ("model..width=3", "ModelConfig has no field ''"),
        ("model.layers=csa:x", "layers: cannot read 'csa:x'"),
        ("model.layers=", "layers is empty"),
    ],
)
def test_a_wrong_override_is_named(override, message):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(TINY, ["train.seed=1", override])
    assert message in str(caught.value)


def test_a_choice_that_may_be_none_lists_it():
    with pytest.raises(ConfigError, match="cache is 'fp9': float32, bf16, fp8,.* or None"):
        apply_overrides(Execution(), ["cache=fp9"])


@pytest.mark.parametrize("value", [3, None, ["csa:4"], [4]])
def test_layers_are_layers_or_text(value):
    layers = (LayerConfig("csa", 4), LayerConfig("window"))
    assert replace(TINY.model, "layers", list(layers)).layers == layers
    with pytest.raises(ConfigError, match="layers is .*: expected layers, or text such as"):
        replace(TINY.model, "layers", value)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("window", [("window", 0)]),
        (" csa:4 , hca:128*2,", [("csa", 4), ("hca", 128), ("hca", 128)]),
        ("0,4,16", [("window", 0), ("csa", 4), ("hca", 16)]),
        ("4*2", [("csa", 4), ("csa", 4)]),
        ("full*1", [("full", 0)]),
        ("", []),
    ],
)
def test_layers_are_read_from_text(text, layers):
    assert parse_layers(text) == tuple(LayerConfig(kind, ratio) for kind, ratio in layers)


@pytest.mark.parametrize(
    "word",
    ["csa", "window:4", "hca:1", "sliding", "csa:4*0", "csa:4*-1", "csa:4*", "4:8", "csa:", "csa:4:4", "1", "-4"],
)
def test_an_unreadable_word_is_named(word):
    with pytest.raises(ConfigError) as caught:
        parse_layers(f"window,{word}")
    assert f"layers: cannot read {word!r}" in str(caught.value) and "write e.g. window,csa:4" in str(caught.value)


@pytest.mark.parametrize("layer", parse_layers("window,csa:4,hca:2,hca:128,full,csa:2"))
def test_a_layer_prints_as_it_is_read(layer):
    assert parse_layers(str(layer)) == (layer,)


def test_released_codes():
    assert [str(released_layer(ratio)) for ratio in (0, 4, 2, 128)] == ["window", "csa:4", "hca:2", "hca:128"]


def test_a_field_of_what_an_earlier_override_put_there():
    config = apply_overrides(Execution(), ["cache=fp8_tensor", "cache.index=fp4"])
    assert config.cache == CacheFormat("fp8_tensor", "fp8_tensor", "fp4")
    config = apply_overrides(Execution(cache=CacheFormat()), ["cache.index=fp4", "cache.window=int8"])
    assert config.cache == CacheFormat("int8", "fp8", "fp4")
    with pytest.raises(ConfigError, match="cache is None: it has no field 'index'"):
        apply_overrides(Execution(cache=CacheFormat()), ["cache=none", "cache.index=fp4"])

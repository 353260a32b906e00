"""The storage that only dsv4 reads: config.json both ways, and everything that can be wrong with its files."""

import dataclasses
import json
from types import SimpleNamespace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import dsv4
from dsv4.checkpoint import CheckpointError, config_from_dict, config_to_dict, export, read
from dsv4.checkpoint.agreement import flatten
from dsv4.checkpoint.transfer import invalid
from dsv4.config import (
    AttentionConfig,
    ConfigError,
    IndexerConfig,
    ModelConfig,
    MoEConfig,
    Recipe,
    StorageConfig,
    read_released,
)
from dsv4.config.layers import parse_layers
from dsv4.config.released import from_released, to_released
from dsv4.parameters import leaves, model_specs, nest, tensor_name
from dsv4.quantize.weights import quantize_leaf
from pallas_kernels.formats import FORMATS
from pallas_kernels.quant import TreatedWeight

CONFIG = ModelConfig(
    layers=parse_layers("window"),
    vocab_size=16,
    width=32,
    max_context=32,
    attention=AttentionConfig(heads=2, head_dim=16, rope_dim=8, q_lora_rank=32, o_groups=1, o_lora_rank=32, window=8),
    indexer=IndexerConfig(heads=2, head_dim=16, top_k=2),
    moe=MoEConfig(experts=2, per_token=1, expert_width=32),
)
STORAGES = [
    StorageConfig(dense="fp8_row", experts="int8_tensor", activations="fp8_row"),
    StorageConfig("float32", dense="e5m2", experts="e5m2", activations="e5m2_group"),
    StorageConfig(dense="int8_row", experts="int8_row", activations="int8_row", static_activations=True, rotate=True),
    StorageConfig(dense="fp8", experts="fp4", outlier_channels=4),
    StorageConfig(dense="fp8", experts="fp4", rotate=True),
    StorageConfig(dense="fp8", experts="plain"),
    StorageConfig(experts="fp4", activations="plain"),
    StorageConfig(dense="fp8", experts="fp8", embedding="int8_row", head="e4m3:1x16:bfloat16"),
    StorageConfig(embedding="int8_row"),
    StorageConfig(dense="e4m3:64x64:float32", activations="e4m3:1x16:bfloat16"),
]
TREATED = StorageConfig(
    dense="int8_row", experts="int8_row", activations="int8_row", outlier_channels=3, static_activations=True
)


@pytest.mark.parametrize("storage", STORAGES)
def test_config_json_says_every_storage(storage):
    config = dataclasses.replace(CONFIG, storage=storage)
    raw = json.loads(json.dumps(to_released(config)))
    assert raw["quantization_config"]["quant_method"] == "dsv4" and "expert_dtype" not in raw
    assert from_released(raw) == config
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


@pytest.mark.parametrize(("dense", "experts"), [("plain", "plain"), ("fp8", "fp8"), ("fp8", "fp4")])
def test_what_is_released_stays_so(dense, experts):
    """However it is spelled: activations that the released code has need no saying."""
    storage = StorageConfig(dense=dense, experts=experts, activations="fp8_group" if dense == "fp8" else None)
    assert storage.released and storage == StorageConfig(dense=dense, experts=experts)
    raw = to_released(dataclasses.replace(CONFIG, storage=storage))
    assert raw.get("quantization_config", {"quant_method": "fp8"})["quant_method"] == "fp8"
    assert from_released(raw).storage == storage


def test_fields_that_the_released_layout_lacks_are_named():
    names = {text.split()[0] for storage in [*STORAGES, TREATED] for text in storage.beyond_released}
    assert names == {field.name for field in dataclasses.fields(StorageConfig)} - {"dtype"}
    assert STORAGES[5].beyond_released == ("experts plain (it has fp8 or fp4 beside dense fp8)",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"densities": 1}, "quantization_config.densities is unknown to the method 'dsv4'"),
        ({"dense": None}, "quantization_config.dense is None, expected the name of a format"),
        ({"dense": "fp7"}, "quantization_config.dense is 'fp7': plain, fp8, fp4"),
        ({"activations": "fp8"}, "quantization_config.activations is 'fp8': a tile must lie in one row"),
        ({"rotate": 1}, "quantization_config.rotate is 1, expected true or false"),
        ({"outlier_channels": 2.0}, "quantization_config.outlier_channels is 2.0, expected an integer"),
        ({"outlier_channels": -1}, "quantization_config.outlier_channels is -1, expected an integer of at least 0"),
        ({"activations": None, "static_activations": True}, "static_activations with activations fp8_group"),
        ({"quant_method": "dsv5"}, "quantization_config.quant_method is 'dsv5', only 'fp8' is supported"),
    ],
)
def test_values_that_are_wrong_are_named(change, message):
    raw = to_released(dataclasses.replace(CONFIG, storage=STORAGES[0]))
    raw["quantization_config"] |= change
    with pytest.raises(ConfigError) as caught:
        from_released(raw)
    assert message in str(caught.value)


def test_all_that_is_wrong_is_one_error():
    raw = to_released(dataclasses.replace(CONFIG, storage=STORAGES[0]))
    del raw["quantization_config"]["head"]
    raw |= {"expert_dtype": "fp8", "hidden_size": "wide"}
    with pytest.raises(ConfigError) as caught:
        from_released(raw)
    assert sorted(str(caught.value).split("; ")) == [
        "expert_dtype is 'fp8', but quantization_config.experts of the method 'dsv4' says it: remove one",
        "hidden_size is 'wide', expected an integer of at least 0",
        "quantization_config.head is missing",
    ]


@pytest.fixture(scope="module")
def model():
    """With every treatment; scales of inputs as a calibration would give them."""
    recipe = Recipe("int8", *[FORMATS["int8_row"]] * 2, activations=FORMATS["int8_row"], outlier_channels=3)
    plain = dsv4.init(CONFIG, seed=5)
    config = dataclasses.replace(CONFIG, storage=recipe.storage(CONFIG.storage, static=True))
    assert config.storage == TREATED
    specs = dict(leaves(model_specs(CONFIG)))
    params = {
        path: quantize_leaf(tensor_name(path), specs[path], leaf, recipe, input_scale=0.25)
        for path, leaf in flatten(plain.params).items()
    }
    return SimpleNamespace(config=config, params=nest(params.items()))


@pytest.fixture
def written(model, tmp_path):
    with pytest.warns(UserWarning, match="only dsv4 will read this checkpoint"):
        export(model, tmp_path / "out")
    return tmp_path / "out"


def test_static_scales_and_channels_arrive_bit_for_bit(model, written, tools):
    found = tools.stored(written)
    assert found["layers.0.attn.wq_a.input_scale"] == ("F32", (1, 1), np.float32(0.25).tobytes())
    assert found["layers.0.ffn.experts.w2.input_scale"][:2] == ("F32", (1, 1))
    assert "layers.0.attn.wo_a.input_scale" not in found and "layers.0.attn.wo_a.outlier_columns" in found
    config, params = read(written)
    assert config == model.config == read_released(written)
    tools.assert_same_bits(params, model.params)


WRONG = {
    "layers.0.attn.wq_a.input_scale is 0.0: a scale is positive": ("layers.0.attn.wq_a.input_scale", np.float32, 0, 0),
    "layers.0.attn.wkv.input_scale[0, 0] is inf": ("layers.0.attn.wkv.input_scale", np.float32, 0, np.inf),
    "layers.0.attn.wkv.scale[2, 0] is nan": ("layers.0.attn.wkv.scale", np.float32, 2, np.nan),
    "wq_b.outlier_channels is [0, 0": ("layers.0.attn.wq_b.outlier_channels", np.int32, slice(2), 0),
    "from 0 to 31": ("layers.0.ffn.experts.w1.outlier_channels", np.int32, 2, 32),
    "w1.outlier_columns[0, 1] is nan": ("layers.0.ffn.experts.1.w1.outlier_columns", np.uint16, 1, 0x7FC0),
}


@pytest.mark.parametrize("message", WRONG)
def test_numbers_that_cannot_be_are_refused(message, written, tools):
    tools.rewrite(written, tools.poke(*WRONG[message]))
    assert message in str(tools.problems_of(written))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layers.0.attn.wq_a.input_scale", "missing tensors"),
        ("layers.0.ffn.experts.0.w1.outlier_columns", "missing tensors"),
    ],
)
def test_absent_siblings_are_missing_tensors(name, message, written, tools):
    tools.rewrite(written, lambda tensors: tensors.pop(name))
    assert tools.problems_of(written).problems[message] == [name]


@pytest.mark.parametrize("bits", [0x7C, 0xFC, 0x7D, 0x7F, 0xFE])
def test_e5m2_has_infinities_and_nans(bits):
    codes = np.arange(256, dtype=np.uint8)
    finite = codes[np.isfinite(codes.view(ml_dtypes.float8_e5m2).astype(np.float32))]
    assert len(finite) == 248 and invalid(finite.view(ml_dtypes.float8_e5m2)) is None
    index, text = invalid(np.array([0, bits], np.uint8).view(ml_dtypes.float8_e5m2))
    assert index == 1 and ("nan" in text or "inf" in text)


CHANGES = {
    "is not rotated, config.storage.rotate says otherwise": ("storage", {"rotate": True}),
    "has channels [3], config.storage says otherwise": ("storage", {"outlier_channels": 0}),
    "has channels int32 [3], config.storage says int32 [2]": ("storage", {"outlier_channels": 2}),
    "has input_scale [1, 1], config.storage says otherwise": ("storage", {"static_activations": False}),
    "has input_scale absent, config.storage says otherwise": ("weight", {"input_scale": None}),
    "has columns float32 [32, 3], config.storage says bfloat16": ("weight", {"columns": jnp.zeros((32, 3))}),
    "is [5, 4, 3]: ascending": ("weight", {"channels": jnp.array([5, 4, 3])}),
}


@pytest.mark.parametrize("message", CHANGES)
def test_weights_and_storage_must_agree(message, model, tmp_path):
    where, change = CHANGES[message]
    tree, config = flatten(model.params), model.config
    if where == "storage":
        config = dataclasses.replace(config, storage=dataclasses.replace(config.storage, **change))
    else:
        path = ("layers", 0, "attn", "wq_a", "weight")
        assert isinstance(tree[path], TreatedWeight)
        tree[path] = dataclasses.replace(tree[path], **change)
    with pytest.raises(CheckpointError) as caught:
        export(SimpleNamespace(config=config, params=nest(tree.items())), tmp_path / "out")
    found = caught.value.problems["wrong shape, dtype or format"]
    assert any(message in text for text in found) and any("wq_a" in text for text in found)
    assert list(tmp_path.iterdir()) == []

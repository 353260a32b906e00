"""A checkpoint on disk under every recipe: the bits of the in-memory conversion, through files and orbax and back."""

import dataclasses
import json

import numpy as np
import pytest

import dsv4
from dsv4 import checkpoint
from dsv4.config import Execution, execution_for, read_released
from dsv4.cost import weight_bytes
from dsv4.parameters import tensor_name
from dsv4.quantize.convert import quantize_checkpoint
from dsv4.quantize.weights import quantize_model

VARIANTS = [
    *("released", "fp8", "fp8_per_tensor", "fp8_per_channel", "fp8_e5m2", "int8", "int8_per_tensor", "mxfp4_experts"),
    *("rotated", "outliers", "both", "embedded", "bfloat16 scales"),
]


@pytest.fixture(scope="module")
def converted(source, tools, tmp_path_factory):
    """Variant -> (directory, report), each made once."""
    folder, made = tmp_path_factory.mktemp("converted"), {}

    def convert(name):
        if name not in made:
            made[name] = folder / name, quantize_checkpoint(source, folder / name, tools.VARIANTS[name])
        return made[name]

    return convert


def test_every_variant_is_here(tools):
    assert tools.VARIANTS.keys() == set(VARIANTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_files_hold_what_memory_does(name, converted, model, tools, tmp_path):
    """The same bits, the same files as an export of the model in memory, the same through orbax."""
    directory, report = converted(name)
    expected = quantize_model(model, tools.VARIANTS[name])
    loaded = dsv4.load(directory)
    assert loaded.config == expected.config and loaded.execution == execution_for(expected.config.storage)
    tools.same_bits(loaded.params, expected.params)
    tools.export_quietly(expected, tmp_path / "exported")
    assert tools.content(directory) == tools.content(tmp_path / "exported")
    assert report.bytes_after == weight_bytes(loaded.config)
    checkpoint.save(expected, tmp_path / "orbax")
    config, params = checkpoint.restore(tmp_path / "orbax")
    assert config == expected.config
    tools.same_bits(params, expected.params)


@pytest.mark.parametrize("name", VARIANTS)
def test_bytes_of_the_arrays_are_those_of_the_config(name, model, tools):
    """Counted from the declared shapes; a hash table has 8 bytes an entry in a file and 4 in memory."""
    quantised = quantize_model(model, tools.VARIANTS[name])
    found = 0
    for path, leaf in checkpoint.agreement.flatten(quantised.params).items():
        found += leaf.nbytes * (2 if tensor_name(path).endswith("tid2eid") else 1)
    assert found == weight_bytes(quantised.config)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_layout_is_the_released_one_where_it_can_be(name, converted):
    directory, report = converted(name)
    raw = json.loads((directory / "config.json").read_text())
    released = name in ("released", "fp8")
    assert report.layout == ("released" if released else "dsv4") and bool(report.beyond_released) != released
    assert raw["quantization_config"]["quant_method"] == ("fp8" if released else "dsv4")
    assert raw.get("expert_dtype") == {"released": "fp4", "fp8": "fp8"}.get(name)


@pytest.mark.parametrize(
    ("name", "dtype", "scale", "expert", "expert_scale"),
    [
        ("released", "F8_E4M3 32 32", "F8_E8M0 1 1", "I8 32 16", "F8_E8M0 32 1"),
        ("fp8_e5m2", "F8_E5M2 32 32", "F8_E8M0 1 1", "F8_E5M2 32 32", "F8_E8M0 1 1"),
        ("fp8_per_tensor", "F8_E4M3 32 32", "F32 1 1", "F8_E4M3 32 32", "F32 1 1"),
        ("int8", "I8 32 32", "F32 32 1", "I8 32 32", "F32 32 1"),
        ("bfloat16 scales", "I8 32 32", "BF16 32 1", "I8 32 32", "F32 32 1"),
    ],
)
def test_what_the_files_say(name, dtype, scale, expert, expert_scale, converted, tools):
    found = {
        tensor: " ".join([kind, *map(str, shape)]) for tensor, (kind, shape) in tools.stored(converted(name)[0]).items()
    }
    assert found["layers.0.attn.wq_a.weight"] == dtype and found["layers.0.attn.wq_a.scale"] == scale
    assert found["layers.1.ffn.experts.1.w2.weight"] == expert
    assert found["layers.1.ffn.experts.1.w2.scale"] == expert_scale
    assert "layers.1.ffn.gate.scale" not in found and found["embed.weight"] == "BF16 256 32"


def test_treated_weights_have_siblings_and_experts_share_theirs(converted, tools):
    found = tools.stored(converted("both")[0])
    assert found["layers.0.attn.wq_a.outlier_columns"] == ("BF16", (32, 3))
    assert found["layers.0.attn.wq_a.outlier_channels"] == ("I32", (3,))
    assert found["mtp.0.ffn.experts.w1.outlier_channels"] == ("I32", (3,))
    assert found["mtp.0.ffn.experts.1.w1.outlier_columns"] == ("BF16", (32, 3))
    assert not [name for name in found if name.endswith("input_scale")]


def test_the_report_names_classes_and_the_worst(converted):
    report = converted("released")[1]
    assert [(each.kind, each.format, each.tensors) for each in report.classes] == [
        ("dense", "fp8", 3 * 5 + 3 * 3 + 1 + 2),
        ("expert", "fp4", 3 * 3 * 2),
    ]
    assert all(0.02 < each.error < 0.03 for each in report.classes if each.format == "fp8")
    assert all(0.1 < each.error < 0.13 for each in report.classes if each.format == "fp4")
    assert len(report.worst) == 10 and all("experts" in name for name, _ in report.worst)
    assert list(report.worst) == sorted(report.worst, key=lambda entry: -entry[1])
    assert report.awkward == () and json.dumps(report.as_dict())


def test_errors_are_those_of_the_weights(converted, model):
    """Of one tensor, computed the long way round."""
    from pallas_kernels.quant import dequantize

    directory, report = converted("int8_per_tensor")
    name, error = report.worst[0]
    before, after = (
        checkpoint.agreement.flatten(dsv4.load(path).params) if path else checkpoint.agreement.flatten(model.params)
        for path in (None, directory)
    )
    parts = [int(part) if part.isdecimal() else part for part in name.split(".")]
    if "experts" in parts:
        expert = parts.pop(parts.index("experts") + 1)
    weight, made = before[tuple(parts)].astype("float32"), dequantize(after[tuple(parts)])
    if "experts" in parts:
        weight, made = weight[expert], made[expert]
    expected = np.linalg.norm(weight - made) / np.linalg.norm(weight)
    assert error == pytest.approx(expected, rel=1e-4)


def test_an_orbax_source_and_a_tokenizer(model, converted, tools, tmp_path):
    (tmp_path / "tokenizer").write_text("{}")
    checkpoint.save(model.replace(tokenizer_path=str(tmp_path / "tokenizer")), tmp_path / "orbax")
    quantize_checkpoint(tmp_path / "orbax", tmp_path / "out", tools.VARIANTS["outliers"])
    found = tools.content(tmp_path / "out")
    assert found.pop("tokenizer.json") == b"{}" and found == tools.content(converted("outliers")[0])


def test_a_research_model_stays_an_orbax_checkpoint(model, tools, tmp_path):
    attention = dataclasses.replace(model.config.attention, sink=False)
    config = dataclasses.replace(model.config, attention=attention)
    research = dsv4.init(config, seed=1)
    checkpoint.save(research, tmp_path / "orbax")
    report = quantize_checkpoint(tmp_path / "orbax", tmp_path / "out", tools.VARIANTS["both"])
    loaded = dsv4.load(tmp_path / "out", execution=Execution())
    expected = quantize_model(research, tools.VARIANTS["both"])
    assert report.layout == "orbax" and loaded.config == expected.config
    tools.same_bits(loaded.params, expected.params)


def test_what_only_we_read_is_a_warning_at_export(model, tools, tmp_path):
    quantised = quantize_model(model, tools.VARIANTS["both"])
    with pytest.warns(UserWarning, match="only dsv4 will read this checkpoint") as caught:
        checkpoint.export(quantised, tmp_path / "out")
    assert len(caught) == 1
    for words in ("dense fp8_row (it has plain or fp8)", "rotate true (it has false)", "outlier_channels 3 (it has 0)"):
        assert words in str(caught[0].message)


def test_a_float32_source_keeps_float32_where_nothing_is_quantised(tools, tmp_path):
    config = dataclasses.replace(tools.CONFIG, storage=dataclasses.replace(tools.CONFIG.storage, dtype="float32"))
    checkpoint.export(dsv4.init(config), tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", tools.VARIANTS["int8"])
    found = tools.stored(tmp_path / "out")
    assert found["embed.weight"][0] == found["layers.0.attn_norm.weight"][0] == "F32"
    assert read_released(tmp_path / "out").storage.dtype == "float32"

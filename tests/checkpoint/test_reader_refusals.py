"""Every way in which a released checkpoint can be wrong, each refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest

from dsv4.checkpoint import reader

ORACLE = Path(__file__).parents[1] / "oracle"
INDEX = "model.safetensors.index.json"


def test_everything_wrong_is_one_error_before_any_weight_is_loaded(copy, tools, monkeypatch):
    directory = copy("swa")

    def change(tensors):
        tensors.pop("layers.2.attn.wq_a.weight")
        tensors["layers.9.attn.wq_a.weight"] = tensors["embed.weight"]
        tools.reshaped("head.weight", tensors["head.weight"][1][::-1])(tensors)
        tools.retyped("norm.weight", "I64", np.int64)(tensors)
        tools.poke("embed.weight", np.float32, 0, np.nan)(tensors)  # not even looked at

    tools.rewrite(directory, change)
    monkeypatch.setattr(reader, "_load", lambda *_: pytest.fail("a weight was loaded"))
    error = tools.problems_of(directory)
    assert error.problems == {
        "missing tensors": ["layers.2.attn.wq_a.weight"],
        "wrong shape or dtype": [
            "norm.weight is I64 [64], config.json asks for F32 [64] (torch_dtype)",
            "head.weight has shape [64, 256], the sizes in config.json give [256, 64]",
        ],
        "tensors this model does not have": ["layers.9.attn.wq_a.weight"],
    }
    assert isinstance(error, ValueError) and all(
        text in str(error) for found in error.problems.values() for text in found
    )


def test_long_lists_are_cut_with_a_count(copy, tools):
    directory = copy("swa")
    tools.rewrite(directory, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".experts." in name])
    error = tools.problems_of(directory)
    count = len(error.problems["missing tensors"])
    assert (
        count == 4 * 4 * 3
        and f"missing tensors ({count}):" in str(error)
        and f"... and {count - 10} more" in str(error)
    )
    assert len(str(error).splitlines()) == 13


MTP = {"mtp.0.enorm.weight": ("F32", (64,), bytes(256))}
EXTRA = {
    "MTP blocks that config.json does not announce": (MTP, "mtp.* without num_nextn_predict_layers"),
    "dspark stages": (MTP | {"mtp.2.markov_head.markov_w1.weight": ("F32", (1,), bytes(4))}, "dspark stages instead"),
    "a dspark name": ({"dspark.0.norm.weight": ("F32", (1,), bytes(4))}, "dspark stages instead"),
    "names of transformers": ({"model.norm.weight": ("F32", (1,), bytes(4))}, "names of transformers"),
    "scales beside plain weights": ({"layers.0.attn.wq_a.scale": ("F8_E8M0", (1, 1), b"\x7f")}, "quantization_config"),
}


@pytest.mark.parametrize("kind", EXTRA)
def test_extra_tensors_are_explained(kind, copy, tools):
    added, cause = EXTRA[kind]
    directory = copy("swa")
    tools.rewrite(directory, lambda tensors: tensors.update(added))
    error = tools.problems_of(directory)
    assert error.problems["tensors this model does not have"] == sorted(added)
    assert cause in "".join(error.problems["likely cause"])
    assert error.problems.keys() == {"tensors this model does not have", "likely cause"}


@pytest.mark.parametrize("expert_dtype", ["fp8", None])
def test_packed_experts_are_never_taken_for_fp8(expert_dtype, copy, tools):
    """The bug of others: every one-byte tensor read as E4M3. config.json decides, and the tensor is named."""
    directory = copy("mixed_fp8fp4")
    tools.edit_config(directory, expert_dtype=expert_dtype)
    found = tools.problems_of(directory).problems["wrong shape or dtype"]
    assert len(found) == 2 * 3 * 3 * 8  # values and scales of every expert of every layer
    assert found[0].startswith(
        "layers.0.ffn.experts.0.w1.weight is I8 [32, 64], config.json asks for F8_E4M3 [32, 128]"
    )
    assert 'packed FP4 is "expert_dtype": "fp4"' in found[0]


def test_quantised_files_under_a_plain_config(copy, tools):
    directory = copy("mixed_fp8fp4")
    tools.edit_config(directory, expert_dtype=None, quantization_config=None)
    error = tools.problems_of(directory)
    assert any("wq_a.weight is F8_E4M3" in text for text in error.problems["wrong shape or dtype"])
    assert any(name.endswith(".scale") for name in error.problems["tensors this model does not have"])


WRONG_DTYPES = {
    "mixed_fp8fp4: E4M3 codes called I8": ("layers.0.attn.wkv.weight", "I8", np.int8, "F8_E4M3 [64, 128]"),
    "mixed_fp8fp4: mHC in bf16": ("hc_head_base", "BF16", np.uint16, "asks for F32 [2]"),
    "swa: a hash table in int32": ("layers.0.ffn.gate.tid2eid", "I32", np.int32, "asks for I64"),
    "swa: bf16 where float32 is promised": ("norm.weight", "BF16", np.uint16, "asks for F32 [64]"),
    "mixed_fp8fp4: half precision": ("norm.weight", "F16", np.uint16, "BF16 or F32"),
}


@pytest.mark.parametrize("kind", WRONG_DTYPES)
def test_a_dtype_that_config_json_does_not_say(kind, copy, tools):
    name, dtype, numpy_dtype, expected = WRONG_DTYPES[kind]
    directory = copy(kind.partition(":")[0])
    tools.rewrite(directory, tools.retyped(name, dtype, numpy_dtype))
    (found,) = tools.problems_of(directory).problems["wrong shape or dtype"]
    assert found.startswith(f"{name} is {dtype}") and expected in found


def test_experts_of_different_dtypes_cannot_be_stacked(copy, tools):
    directory = copy("swa")
    tools.edit_config(directory, torch_dtype="bfloat16")
    tools.rewrite(directory, tools.retyped("layers.1.ffn.experts.3.w2.weight", "BF16", np.uint16))
    (found,) = tools.problems_of(directory).problems["wrong shape or dtype"]
    assert "layers.1.ffn.experts.0.w2.weight and its fellow experts have dtypes BF16, F32" in found


NOT_NUMBERS = {
    "float32 NaN": ("swa", "layers.1.attn.wq_b.weight", np.uint32, 0x7FC00001, "[0, 7] is nan"),
    "float32 infinity": ("swa", "layers.3.ffn.experts.2.w3.weight", np.uint32, 0xFF800000, "[0, 7] is -inf"),
    "bfloat16 NaN": ("mixed_fp8fp4", "embed.weight", np.uint16, 0x7F81, "[0, 7] is nan"),
    "E4M3 NaN code": ("mixed_fp8fp4", "layers.2.attn.wkv.weight", np.uint8, 0xFF, "[0, 7] is nan"),
    "E8M0 code 255": ("mixed_fp8fp4", "layers.1.ffn.experts.7.w1.scale", np.uint8, 0xFF, "[1, 3] is nan"),
    "hash table beyond the experts": ("swa", "layers.0.ffn.gate.tid2eid", np.int64, 4, "[3, 1] is expert 4"),
    "negative expert": ("swa", "layers.0.ffn.gate.tid2eid", np.int64, -1, "[3, 1] is expert -1"),
    "expert number beyond int32": ("swa", "layers.0.ffn.gate.tid2eid", np.int64, 2**32, "is expert 4294967296"),
}


@pytest.mark.parametrize("kind", NOT_NUMBERS)
def test_a_value_that_is_no_weight_is_named(kind, copy, tools):
    case, name, dtype, bits, expected = NOT_NUMBERS[kind]
    directory = copy(case)
    tools.rewrite(directory, tools.poke(name, dtype, 7, bits))
    error = tools.problems_of(directory)
    assert f"{name}" in str(error) and expected in str(error) and "nothing was loaded" in str(error)


def test_broken_and_missing_files(copy, tools):
    directory = copy("mixed")
    first, second = sorted(directory.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-100])
    second.unlink()
    error = tools.problems_of(directory)
    assert error.problems.keys() == {"broken file", "missing file"}  # their tensors are not complained about again
    assert error.problems["broken file"][0].startswith(f"{first.name}: truncated")
    (directory / INDEX).unlink()
    assert tools.problems_of(directory).problems == error.problems
    first.unlink()
    assert "model.safetensors, or" in str(tools.problems_of(directory))


def test_an_index_that_disagrees_with_the_files(copy, tools):
    directory = copy("mixed")
    raw = json.loads((directory / INDEX).read_text())
    first, second = sorted(path.name for path in directory.glob("*.safetensors"))
    assert raw["weight_map"]["embed.weight"] == first
    raw["weight_map"] |= {"embed.weight": second, "ghost": first}
    unlisted = next(name for name, file in raw["weight_map"].items() if file == second and name != "embed.weight")
    del raw["weight_map"][unlisted]
    (directory / INDEX).write_text(json.dumps(raw))
    found = tools.problems_of(directory).problems[f"{INDEX} disagrees with the files"]
    assert set(found) == {
        f"{first} holds embed.weight, the index says {second}",
        f"{second} does not hold embed.weight, the index says so",
        f"{first} does not hold ghost, the index says so",
        f"{second} holds {unlisted}, the index does not list it",
    }


@pytest.mark.parametrize(
    "text",
    ["[]", "{", '{"weight_map": {}}', '{"weight_map": {"a": "../a"}}', '{"weight_map": {"a": 1}}', "[" * 100_000],
)
def test_a_hostile_index(text, copy, tools):
    directory = copy("mixed")
    (directory / INDEX).write_text(text)
    assert tools.problems_of(directory).problems["broken file"][0].startswith(f"{INDEX}: ")


def test_directories_that_are_no_released_checkpoint(tmp_path, tools):
    assert "no such directory" in str(tools.problems_of(tmp_path / "absent"))
    (tmp_path / "_CHECKPOINT_METADATA").write_text("{}")
    assert "dsv4.checkpoint.restore reads" in str(tools.problems_of(tmp_path))


def test_a_layout_that_the_number_format_cannot_hold(copy, tools):
    directory = copy("mixed_fp8fp4")
    tools.edit_config(directory, moe_intermediate_size=33)
    text = str(tools.problems_of(directory))
    assert "layers.0.ffn.experts.w2.weight: e2m1:1x32:ue8m0 cannot hold this: the last axis of (128, 33)" in text

"""Reading released checkpoints: every recorded one bit for bit, parts of them, and what else is accepted."""

import json
import math
import re
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from dsv4.checkpoint import read
from dsv4.checkpoint.layout import stored_leaves
from dsv4.checkpoint.safetensors import DTYPES
from dsv4.config import load_config, read_released
from pallas_kernels.quant import FP8_BLOCK, MXFP4, QuantTensor, dequantize

ORACLE = Path(__file__).parents[1] / "oracle"
CASES = ("swa", "csa", "hca16", "hca128", "mixed", "mixed_fp8fp4")
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("case", CASES)
def test_every_stored_tensor_arrives_bit_for_bit(case, tools):
    """The path of a leaf IS its stored name; experts are stacked in order; nothing else is in the tree."""
    stored = tools.stored(ORACLE / "ckpt" / case)
    config, params = read(ORACLE / "ckpt" / case)
    assert config == read_released(ORACLE / "ckpt" / case)
    seen = set()
    for path, leaf in jax.tree.leaves_with_path(params, is_leaf=lambda x: isinstance(x, QuantTensor)):
        assert path[0].key not in ("layers", "mtp") or type(path[1].key) is int
        name = ".".join(str(key.key) for key in path)
        parts = {name: leaf}
        if isinstance(leaf, QuantTensor):
            assert leaf.validate() == [] and leaf.format is (MXFP4 if ".experts." in name else FP8_BLOCK)
            parts = {name: leaf.values, name.replace("weight", "scale"): leaf.scale}
        for stored_name, array in parts.items():
            before, stacked, after = stored_name.partition(".experts.")
            names = [f"{before}.experts.{e}.{after}" for e in range(config.moe.experts)] if stacked else [stored_name]
            bits = [tools.expected_bits(stored, n) for n in names]
            seen |= set(names)
            actual = np.asarray(array)
            if stored[names[0]][0] == "I64":
                assert actual.dtype == np.int32
            else:
                actual = actual.view(tools.BITS[stored[names[0]][0]])
            np.testing.assert_array_equal(actual, np.stack(bits) if stacked else bits[0], err_msg=stored_name)
    assert seen == stored.keys()


def test_packed_experts_mean_what_the_reference_decoder_says(tools):
    """Nibble order, group axis and the exponent byte at once."""
    stored = tools.stored(ORACLE / "ckpt" / "mixed_fp8fp4")
    _, params = read(ORACLE / "ckpt" / "mixed_fp8fp4")
    w1 = dequantize(params["layers"][1]["ffn"]["experts"]["w1"]["weight"])
    packed = tools.expected_bits(stored, "layers.1.ffn.experts.5.w1.weight")
    scale = tools.expected_bits(stored, "layers.1.ffn.experts.5.w1.scale")
    table = np.load(ORACLE / "quant_vectors.npz")["e2m1_values"]
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(packed.shape[0], -1)
    expected = table[codes] * np.repeat(np.exp2(scale.astype(np.float32) - 127), 32, axis=1)
    np.testing.assert_array_equal(np.asarray(w1[5]), expected)


def test_layout_of_flash_is_the_published_one():
    """Count and size are those that listings of the released V4-Flash give: 69,187 tensors, 148.65 GiB in 46 shards."""
    tensors = [tensor for leaf in stored_leaves(load_config("flash").model) for tensor in leaf.tensors]
    size = sum(math.prod(tensor.shape) * DTYPES[tensor.dtypes[0]].itemsize for tensor in tensors)
    assert (len(tensors), round(size / 2**30, 2)) == (69187, 148.65)
    assert len({tensor.name for tensor in tensors}) == len(tensors)


@pytest.mark.parametrize("layers", [range(0, 3), range(2, 5), range(4, 7), range(0, 7)])
def test_some_layers(layers, tools):
    whole_config, whole = read(ORACLE / "ckpt" / "mixed")
    config, params = read(ORACLE / "ckpt" / "mixed", layers=layers)
    assert config.layers == whole_config.layers[layers.start : layers.stop]
    assert config.moe.hash_layers == {0: 3, 2: 1, 4: 0}[layers.start]
    assert config.mtp_blocks == 0
    whole.pop("mtp")
    whole["layers"] = {i - layers.start: whole["layers"][i] for i in layers}
    tools.assert_same_bits(params, whole)


@pytest.mark.parametrize("layers", [range(0), range(3, 8), range(-1, 2), range(0, 4, 2)])
def test_layers_that_are_not_there(layers):
    with pytest.raises(ValueError, match=r"give range\(a, b\) with 0 <= a < b <= 7"):
        read(ORACLE / "ckpt" / "mixed", layers=layers)


def test_some_layers_need_only_their_shards(copy, tools):
    """A shard that holds none of the layers asked for may be absent, but not one that does."""
    directory = copy("mixed")
    stored = tools.stored(directory)
    for path in directory.glob("*.safetensors"):
        path.unlink()
    shards = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    for name, tensor in stored.items():
        late = re.match(r"layers\.[3-6]\.|mtp", name) is not None
        shards[f"model-0000{1 + late}-of-00002.safetensors"][name] = tensor
    for file, tensors in shards.items():
        (directory / file).write_bytes(tools.pack({}, b""))
        tools.rewrite(directory, lambda empty, t=tensors: empty.update(t), file)
    index = {"weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
    (directory / INDEX).write_text(json.dumps(index))
    (directory / "model-00002-of-00002.safetensors").unlink()
    config, _ = read(directory, layers=range(0, 3))
    assert len(config.layers) == 3
    error = tools.problems_of(directory, layers=range(2, 4))
    assert error.problems == {"missing file": ["model-00002-of-00002.safetensors"]}


def test_shards_without_an_index_and_a_single_renamed_file(copy, tools):
    _, expected = read(ORACLE / "ckpt" / "mixed")
    directory = copy("mixed")
    (directory / INDEX).unlink()
    tools.assert_same_bits(read(directory)[1], expected)
    (directory / "model-00001-of-00002.safetensors").rename(directory / "a.safetensors")
    (directory / "model-00002-of-00002.safetensors").rename(directory / "b.safetensors")
    tools.assert_same_bits(read(directory, workers=1)[1], expected)
    (directory / "c.safetensors").write_bytes((directory / "b.safetensors").read_bytes())
    assert "b.safetensors, c.safetensors" in str(tools.problems_of(directory))


def test_progress_counts_every_byte(tools):
    calls = []
    read(ORACLE / "ckpt" / "swa", progress=lambda done, total: calls.append((done, total)))
    size = sum(len(content) for _, _, content in tools.stored(ORACLE / "ckpt" / "swa").values())
    done = [d for d, _ in calls]
    assert done == sorted(done) and calls[-1] == (size, size) and {total for _, total in calls} == {size}


def test_unsigned_packed_experts_and_wider_floats_are_accepted(copy, tools):
    """U8 is the same bytes as I8; F32 under torch_dtype bfloat16 loses nothing and stays F32."""
    directory = copy("mixed_fp8fp4")

    def change(tensors):
        for name, (dtype, shape, content) in list(tensors.items()):
            if dtype == "I8":
                tensors[name] = ("U8", shape, content)
        _, shape, content = tensors["norm.weight"]
        wide = np.frombuffer(content, ml_dtypes.bfloat16).astype(np.float32)
        tensors["norm.weight"] = ("F32", shape, wide.tobytes())

    _, expected = read(directory)
    tools.rewrite(directory, change)
    _, params = read(directory)
    expected["norm"]["weight"] = expected["norm"]["weight"].astype(np.float32)
    tools.assert_same_bits(params, expected)


def test_float32_scales_are_accepted_where_they_are_powers_of_two(copy, tools):
    """The Base checkpoints keep the scales of 128 x 128 tiles so."""
    name = "layers.0.attn.wo_a.scale"
    directory = copy("mixed_fp8fp4")
    wide = np.array([[2.0**-127, 2.0**127]], np.float32)
    tools.rewrite(directory, lambda tensors: tensors.update({name: ("F32", (1, 2), wide.tobytes())}))
    _, params = read(directory)
    codes = np.asarray(params["layers"][0]["attn"]["wo_a"]["weight"].scale).view(np.uint8)
    np.testing.assert_array_equal(codes, [[0, 254]])
    for bad in (0.3, 0.0, -1.0, np.inf, np.nan, 2.0**-128):
        tools.rewrite(directory, tools.poke(name, np.float32, 1, bad))
        with np.errstate(all="ignore"):
            error = tools.problems_of(directory)
        assert f"{name}[0, 1] is a scale of" in str(error)


def test_a_duplicate_expert_for_a_token_is_no_error(copy, tools):
    directory = copy("swa")
    tools.rewrite(directory, tools.poke("layers.0.ffn.gate.tid2eid", np.int64, slice(0, 2), 1))
    _, params = read(directory)
    np.testing.assert_array_equal(params["layers"][0]["ffn"]["gate"]["tid2eid"][0], [1, 1])

"""Export: byte-exact round trips, agreement of config and parameters, and failures that leave nothing behind."""

import dataclasses
import json
import resource
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4.checkpoint import CheckpointError, export, read
from dsv4.config import ConfigError, LayerConfig, StorageConfig
from pallas_kernels.quant import FP8_BLOCK, QuantTensor, dequantize

ORACLE = Path(__file__).parents[1] / "oracle" / "ckpt"
CASES = ("swa", "csa", "hca16", "hca128", "mixed", "mixed_fp8fp4")
INDEX = "model.safetensors.index.json"


def load(case):
    config, params = read(ORACLE / case)
    return SimpleNamespace(config=config, params=params)


def replaced(model, path, value):
    """A model with one leaf (or, for None, without it)."""
    params = jax.tree.map(lambda leaf: leaf, model.params, is_leaf=lambda leaf: isinstance(leaf, QuantTensor))
    node = params
    for key in path[:-1]:
        node = node[key]
    if value is None:
        del node[path[-1]]
    else:
        node[path[-1]] = value(node.get(path[-1]))
    return SimpleNamespace(config=model.config, params=params)


def nothing_left(folder):
    return list(folder.iterdir()) == []


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_byte_exact(case, tmp_path, tools):
    model = load(case)
    export(model, tmp_path / "out")
    assert tools.stored(tmp_path / "out") == tools.stored(ORACLE / case)
    config, params = read(tmp_path / "out")
    assert config == model.config
    tools.assert_same_bits(params, model.params)


@pytest.mark.parametrize("case", ["mixed", "mixed_fp8fp4"])
def test_shards_and_their_index(case, tmp_path, tools):
    limit = 100_000
    export(load(case), tmp_path / "out", max_shard_bytes=limit)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 5 and {f.name for f in files} == set(index["weight_map"].values())
    assert files[-1].name == f"model-{len(files):05}-of-{len(files):05}.safetensors"
    stored = tools.stored(tmp_path / "out")
    assert stored == tools.stored(ORACLE / case) and index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(len(content) for _, _, content in stored.values())
    for file in files:
        sizes = [len(stored[name][2]) for name, where in index["weight_map"].items() if where == file.name]
        assert sum(sizes) <= limit or len(sizes) == 1
    tools.assert_same_bits(read(tmp_path / "out")[1], read(ORACLE / case)[1])


def test_tokenizer_and_empty_destination(tmp_path):
    (tmp_path / "tok").write_text("{}")
    (tmp_path / "out").mkdir()
    model = load("swa")
    model.tokenizer_path = str(tmp_path / "tok")
    export(model, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    model.tokenizer_path = None
    export(model, tmp_path / "deeper" / "other")
    assert not (tmp_path / "deeper" / "other" / "tokenizer.json").exists()


def test_a_directory_that_is_not_vacant_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        export(load("swa"), tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        export(load("swa"), tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_all_disagreements_are_one_error(tmp_path):
    model = load("mixed_fp8fp4")
    model = replaced(model, ("norm", "weight"), None)
    model = replaced(model, ("surplus",), lambda _: jnp.zeros(3))
    model = replaced(model, ("head", "weight"), lambda x: x[:, :-1])
    model = replaced(model, ("embed", "weight"), lambda x: x.astype(jnp.float16))
    model = replaced(model, ("hc_head_base",), lambda x: x.astype(jnp.bfloat16))
    model = replaced(model, ("layers", 0, "ffn", "gate", "tid2eid"), lambda x: x.astype(jnp.uint32))
    model = replaced(model, ("layers", 0, "attn", "wkv", "weight"), dequantize)
    model = replaced(
        model, ("layers", 1, "attn", "wkv", "weight"), lambda x: QuantTensor(x.values, x.values, FP8_BLOCK)
    )
    with pytest.raises(CheckpointError) as caught:
        export(model, tmp_path / "out")
    problems = caught.value.problems
    assert problems["missing parameters"] == ["norm.weight"]
    assert problems["parameters this config does not have"] == ["surplus"]
    found = {text.split()[0]: text for text in problems["wrong shape, dtype or format"]}
    expected = {
        "head.weight": "has shape [256, 127], its config says [256, 128]",
        "embed.weight": "is float16, config.storage says BF16 or F32",
        "hc_head_base": "is bfloat16, config.storage says F32",
        "layers.0.ffn.gate.tid2eid": "is uint32, hash tables are int32",
        "layers.0.attn.wkv.weight": "is not quantised, config.storage says e4m3:128x128:ue8m0: quantise",
        "layers.1.attn.wkv.weight": "is no e4m3:128x128:ue8m0 tensor: scale are float8_e4m3fn",
    }
    assert found.keys() == expected.keys()
    assert all(expected[name] in text for name, text in found.items())
    assert nothing_left(tmp_path)


def test_quantised_leaves_need_a_config_that_says_so(tmp_path):
    model = load("mixed_fp8fp4")
    model.config = dataclasses.replace(model.config, storage=StorageConfig("bfloat16"))
    with pytest.raises(CheckpointError, match="is e2m1:1x32:ue8m0, config.storage says not quantised") as caught:
        export(model, tmp_path / "out")
    assert len(caught.value.problems["wrong shape, dtype or format"]) == 25 + 9


def test_what_config_json_cannot_say_is_refused(tmp_path):
    model = load("mixed_fp8fp4")
    layers = (LayerConfig("csa", 2), *model.config.layers[1:])
    with pytest.raises(ConfigError, match="layer 0 is csa:2"):
        export(SimpleNamespace(config=dataclasses.replace(model.config, layers=layers), params={}), tmp_path / "out")
    assert nothing_left(tmp_path)


BAD_VALUES = {
    "wq_a.weight[3, 5] is nan": (("layers", 2, "attn", "wq_a", "weight"), (3, 5), jnp.nan),
    "experts.2.w2.weight[7, 1] is inf": (("layers", 1, "ffn", "experts", "w2", "weight"), (2, 7, 1), jnp.inf),
    "tid2eid[9, 1] is expert 4": (("layers", 0, "ffn", "gate", "tid2eid"), (9, 1), 4),
}


@pytest.mark.parametrize("expected", BAD_VALUES)
def test_values_that_could_not_be_read_back_are_not_written(expected, tmp_path):
    path, at, value = BAD_VALUES[expected]
    with pytest.raises(CheckpointError) as caught:
        export(replaced(load("swa"), path, lambda x: x.at[at].set(value)), tmp_path / "out")
    assert expected in str(caught.value) and nothing_left(tmp_path)


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    """The kernel refuses to let a file grow beyond a limit, as it does on a full disk, in the middle of a tensor."""
    model, (soft, hard) = load("swa"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot write .*, nothing was left there: .*File too large"):
            export(model, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert nothing_left(tmp_path)


def test_an_unwritable_place_and_a_missing_tokenizer_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write .*file/out.*Not a directory"):
        export(load("swa"), tmp_path / "file" / "out")
    model = load("swa")
    model.tokenizer_path = tmp_path / "absent.json"
    with pytest.raises(CheckpointError, match="No such file.*absent.json"):
        export(model, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_numpy_leaves_are_written_as_they_are(tmp_path, tools):
    model = load("swa")
    model.params = jax.tree.map(np.asarray, model.params)
    export(model, tmp_path / "out")
    assert tools.stored(tmp_path / "out") == tools.stored(ORACLE / "swa")

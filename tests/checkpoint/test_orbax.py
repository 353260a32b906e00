"""Our own checkpoints through orbax: research models, every dtype, and what a directory that is none of them gives."""

import dataclasses
import json
import logging
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4.checkpoint import CheckpointError, config_from_dict, config_to_dict, is_orbax, read, restore, save
from dsv4.config import (
    AttentionConfig,
    ConfigError,
    HyperConnectionConfig,
    IndexerConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    StorageConfig,
    YarnConfig,
)
from pallas_kernels.quant import FP8_BLOCK, MXFP4, QuantTensor

ORACLE = Path(__file__).parents[1] / "oracle" / "ckpt"
# Nothing here is a default, and the released format can express none of layers, sink, experts and residual.
RESEARCH = ModelConfig(
    layers=(LayerConfig("full"), LayerConfig("csa", 2), LayerConfig("hca", 16), LayerConfig("window")),
    vocab_size=100,
    width=48,
    max_context=333,
    attention=AttentionConfig(4, 24, 8, 20, 2, 12, 7, False, 5000.0, 70000.0, YarnConfig(3.0, 128, 16.0, 2.0)),
    indexer=IndexerConfig(3, 10, 5),
    moe=MoEConfig(0, 1, 2, 40, 0, "sigmoid", False, 1.25, 3.5),
    residual=HyperConnectionConfig("plain", 1, 3, 1e-5),
    mtp_blocks=1,
    norm_eps=1e-5,
    initializer_range=0.5,
    bos_id=7,
    eos_id=8,
    storage=StorageConfig("float32", "fp8", "fp4"),
)


def random_bits(dtype, shape, seed):
    """Every pattern of the dtype may occur, NaNs included."""
    dtype = np.dtype(dtype)
    raw = np.random.default_rng(seed).integers(0, 256, int(np.prod(shape)) * dtype.itemsize, np.uint8)
    return raw.view(dtype).reshape(shape)


def every_dtype():
    plain = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.uint32, jnp.int8, jnp.uint8]
    plain += [jnp.float8_e4m3fn, jnp.float8_e5m2]
    packed, codes = random_bits(np.uint8, (3, 5, 32), 1), random_bits(ml_dtypes.float8_e4m3fn, (130, 40), 2)
    e8m0 = ml_dtypes.float8_e8m0fnu
    return {
        "layers": {
            i: {"attn": {jnp.dtype(dtype).name: jax.device_put(random_bits(dtype, (4, 6), i))}}
            for i, dtype in enumerate(plain)
        }
        | {10: {"w": QuantTensor(jax.device_put(codes), jax.device_put(random_bits(e8m0, (2, 1), 3)), FP8_BLOCK)}},
        "experts": QuantTensor(jax.device_put(packed), jax.device_put(random_bits(e8m0, (3, 5, 2), 4)), MXFP4),
    }


def test_every_dtype_and_format_of_a_research_model(tmp_path, tools, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a relative path is as good as an absolute one
    (tmp_path / "tok").write_text("{}")
    model = SimpleNamespace(config=RESEARCH, params=every_dtype(), tokenizer_path=tmp_path / "tok")
    assert not is_orbax("run/step-3")
    save(model, "run/step-3")
    assert is_orbax("run/step-3") and (tmp_path / "run" / "step-3" / "tokenizer.json").is_file()
    config, params = restore("run/step-3")
    assert config == RESEARCH
    tools.assert_same_bits(params, model.params)
    assert list(params["layers"]) == [*range(9), 10]  # ints, in order
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["step-3"]


@pytest.mark.parametrize("case", ["mixed", "mixed_fp8fp4"])
def test_a_released_checkpoint_survives_the_detour(case, tmp_path, tools, caplog):
    config, params = read(ORACLE / case)
    with caplog.at_level(logging.DEBUG):
        save(SimpleNamespace(config=config, params=params), tmp_path / "own")
        restored = restore(tmp_path / "own")
    assert restored[0] == config
    tools.assert_same_bits(restored[1], params)
    assert not [record for record in caplog.records if record.name == "absl"]


def test_config_json_carries_every_field():
    for name in (f.name for f in dataclasses.fields(ModelConfig) if f.default is not dataclasses.MISSING):
        assert getattr(RESEARCH, name) != ModelConfig.__dataclass_fields__[name].default, (
            f"{name} is left at its default"
        )
    raw = json.loads(json.dumps(config_to_dict(RESEARCH)))
    assert config_from_dict(raw) == RESEARCH
    assert type(config_from_dict(raw).layers[1]) is LayerConfig


def test_config_json_of_other_versions_and_hands():
    raw = json.loads(json.dumps(config_to_dict(RESEARCH)))
    older = {key: value for key, value in raw.items() if key != "storage"}
    assert config_from_dict(older) == dataclasses.replace(RESEARCH, storage=StorageConfig())
    for path, value, message in [
        (("moe", "newer"), 1, "config.moe has fields this version of dsv4 does not know: newer"),
        (("layers",), {}, "config.layers is {}, expected a list"),
        (("layers", 1), 4, "config.layers[1] is 4, expected an object"),
        (("width",), "48", "config.width is '48', expected int"),
        (("width",), True, "config.width is True, expected int"),
        (("attention", "sink"), 1, "config.attention.sink is 1, expected bool"),
        (("attention", "yarn"), [], "config.attention.yarn is [], expected an object"),
        (("moe", "scoring"), None, "config.moe.scoring is None, expected str"),
    ]:
        broken = json.loads(json.dumps(raw))
        node = broken
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        with pytest.raises(ConfigError) as caught:
            config_from_dict(broken)
        assert message in str(caught.value)
    with pytest.raises(ConfigError, match="config lacks layers"):
        config_from_dict({})


@pytest.mark.parametrize(
    "params, message",
    [
        ({"a": {"1": jnp.zeros(1)}}, "keys .'1'. under 'a': all must be names, or all ints"),
        ({"a": {1.5: jnp.zeros(1)}}, "keys .1.5. under 'a'"),
        ({"a": {1: jnp.zeros(1), "b": jnp.zeros(1)}}, "keys .1, 'b'. under 'a'"),
        ({"a": [jnp.zeros(1)]}, "a is .*only non-empty arrays"),
        ({"a": jnp.zeros((0, 3))}, "a is .*only non-empty arrays"),
        ({"a": {}}, "a is {}"),
        ({"a": np.zeros(2, np.int64)}, "a is int64, jax makes it int32"),
    ],
)
def test_trees_that_cannot_be_stored(params, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        save(SimpleNamespace(config=RESEARCH, params=params), tmp_path / "own")
    assert list(tmp_path.iterdir()) == []


def tiny(folder):
    save(SimpleNamespace(config=RESEARCH, params={"a": jnp.arange(4096.0)}), folder)
    return folder


def test_existing_directories_are_left_alone(tmp_path):
    (tmp_path / "empty").mkdir()
    own = tiny(tmp_path / "empty")
    before = sorted(own.rglob("*"))
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        tiny(own)
    assert sorted(own.rglob("*")) == before


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    params = {"a": jax.device_put(random_bits(np.int32, (512, 512), 0))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot write .*, nothing was left there"):
            save(SimpleNamespace(config=RESEARCH, params=params), tmp_path / "own")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_directories_that_are_no_checkpoint_of_ours(tmp_path):
    with pytest.raises(CheckpointError, match="is no orbax checkpoint; dsv4.checkpoint.read reads"):
        restore(ORACLE / "swa")
    from orbax.checkpoint import v1 as ocp

    ocp.save(str(tmp_path / "foreign"), {"a": jnp.zeros(2)})
    with pytest.raises(CheckpointError, match="not written by dsv4.checkpoint.save .* kind None"):
        restore(tmp_path / "foreign")


def test_damaged_checkpoints(tmp_path):
    own = tiny(tmp_path / "data")
    for data in own.rglob("d/*"):
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="cannot be restored"):
        restore(own)
    own = tiny(tmp_path / "metadata")
    (own / "_CHECKPOINT_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be restored|not written by"):
        restore(own)


def test_orbax_is_imported_only_when_needed():
    code = "import sys, dsv4.checkpoint; assert 'orbax' not in sys.modules and 'tensorstore' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

"""`dsv4 quantize`: the table, the layout it names, overrides, calibration, and errors in one line."""

import dataclasses
import json
import shutil

import pytest

import dsv4 as library
from dsv4 import checkpoint
from dsv4.checkpoint.incremental import IncrementalExport
from dsv4.config import AttentionConfig, IndexerConfig, ModelConfig, MoEConfig, read_released
from dsv4.config.layers import parse_layers

CONFIG = ModelConfig(
    layers=parse_layers("window"),
    vocab_size=256,
    width=32,
    max_context=32,
    attention=AttentionConfig(heads=2, head_dim=16, rope_dim=8, q_lora_rank=32, o_groups=1, o_lora_rank=32, window=8),
    indexer=IndexerConfig(heads=2, head_dim=16, top_k=2),
    moe=MoEConfig(experts=2, per_token=1, expert_width=32),
)


@pytest.fixture(scope="module")
def source(released, tmp_path_factory):
    """A 16-bit checkpoint with a tokenizer of bytes."""
    directory = tmp_path_factory.mktemp("plain") / "model"
    checkpoint.export(library.init(CONFIG), directory)
    shutil.copy(released / "tokenizer.json", directory)
    return directory


@pytest.fixture
def refuses(dsv4):
    """Runs a command that must fail, and returns the line that says why."""

    def run(*argv, code=1):
        result = dsv4(*argv)
        assert result.code == code and result.out == "", result
        line = result.err.splitlines()[-1]
        assert line.startswith("dsv4: error: ")
        return line

    return run


def unfinished(directory):
    return list(directory.glob(".*.unfinished"))


def test_the_released_recipe(dsv4, source, tmp_path):
    out, facts = tmp_path / "out", tmp_path / "facts.json"
    result = dsv4("quantize", source, out, "--recipe", "released", "--json", facts)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].split() == ["class", "format", "tensors", "relative", "error"]
    assert [line.split()[:3] for line in lines[1:3]] == [["dense", "fp8", "8"], ["expert", "fp4", "6"]]
    assert "worst tensors" in result.out and "the released layout, which other implementations read" in result.out
    assert result.err.startswith("quantising") and "warning" not in result.err
    written = json.loads(facts.read_text())
    assert written["layout"] == "released" and written["bytes_after"] < written["bytes_before"]
    assert written["recipe"] == "released" and written["classes"][0]["kind"] == "dense"
    assert read_released(out).storage.experts == "fp4" and (out / "tokenizer.json").is_file()


def test_overrides_and_what_only_we_read(dsv4, source, tmp_path):
    options = ("--set", "dense=int8_row", "--set", "rotate=true", "--set", "head=fp8_row", "--set", "cache.index=fp4")
    result = dsv4("quantize", source, tmp_path / "out", "--recipe", "mxfp4_experts", *options)
    assert result.code == 0, result.err
    assert "note: the files do not say how a cache is stored" in result.err
    storage = read_released(tmp_path / "out").storage
    assert (storage.dense, storage.experts, storage.head, storage.rotate) == ("int8_row", "fp4", "fp8_row", True)
    last = result.out.splitlines()[-1]
    assert last.startswith('only dsv4 reads it (quant_method "dsv4"), the released layout lacks: dense int8_row (')
    assert "rotate true" in last and "head fp8_row" in last


def test_calibration_from_a_text(dsv4, source, tmp_path):
    (tmp_path / "text").write_text("In the beginning was the word. " * 5)
    options = ("--recipe", "int8", "--calibrate", tmp_path / "text", "--calibration-method", "mse")
    result = dsv4("quantize", source, tmp_path / "out", *options)
    assert result.code == 0, result.err
    loaded = library.load(tmp_path / "out")
    assert loaded.config.storage.static_activations
    assert loaded.params["layers"][0]["attn"]["wq_a"]["weight"].input_scale.shape == (1, 1)


def test_a_run_that_was_interrupted(dsv4, source, tmp_path, monkeypatch):
    finish = IncrementalExport.finish

    def interrupted(self, leaf, facts):
        finish(self, leaf, facts)
        if len(self.done) == 7:
            raise KeyboardInterrupt

    command = ("quantize", source, tmp_path / "out", "--recipe", "fp8")
    with monkeypatch.context() as patch:
        patch.setattr(IncrementalExport, "finish", interrupted)
        result = dsv4(*command)
    assert result.code == 130 and "note: 7 of" in result.err and unfinished(tmp_path)
    result = dsv4(*command)
    assert result.code == 0 and "note: going on with an unfinished run: 7 of" in result.err
    assert not unfinished(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "fp9"], "no recipe 'fp9': did you mean 'fp8'? there are bf16, released"),
        (["--recipe", "fp8", "--set", "expert=fp8"], "--set: Recipe has no field 'expert'; did you mean 'experts'?"),
        (["--recipe", "fp8", "--set", "router=fp8"], "--set: Recipe has no field 'router'"),
        (["--recipe", "fp8", "--set", "dense=fp7"], "--set: dense is 'fp7'"),
        (["--recipe", "int8", "--set", "cache.index=int8"], "--set: cache.index is 'int8'"),
    ],
)
def test_what_stands_on_the_command_line_is_2(refuses, source, tmp_path, options, message):
    assert message in refuses("quantize", source, tmp_path / "out", *options, code=2)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_converted_is_1(refuses, source, released, tmp_path):
    out = tmp_path / "out"
    assert "is quantised already (layers.0" in refuses("quantize", released, out, "--recipe", "int8")
    assert "quantises nothing" in refuses("quantize", source, out, "--recipe", "bf16")
    message = refuses("quantize", source, out, "--recipe", "fp8", "--set", "dense=e4m3:1x24:ue8m0")
    assert "layers.0.attn.wq_a.weight cannot be e4m3:1x24:ue8m0" in message
    assert "no checkpoint 'nowhere'" in refuses("quantize", "nowhere", out, "--recipe", "fp8")
    assert "is the checkpoint to read" in refuses("quantize", source, source, "--recipe", "fp8")
    assert list(tmp_path.iterdir()) == []


def test_texts_that_cannot_be_used_are_1(refuses, source, tmp_path):
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text("too short")
    command = ("quantize", source, out, "--calibrate", text, "--recipe")
    assert "has 9 tokens: calibration needs at least 31" in refuses(*command, "int8")
    assert "calibration would change nothing" in refuses(*command, "released")
    text.write_bytes(b"\xff\xff")
    assert "is not UTF-8 text" in refuses(*command, "int8")
    assert not out.exists() and not unfinished(tmp_path)


def test_shapes_that_others_get_wrong_are_one_warning(dsv4, tmp_path):
    wide = dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, expert_width=160))
    checkpoint.export(library.init(wide), tmp_path / "source")
    result = dsv4("quantize", tmp_path / "source", tmp_path / "out", "--recipe", "fp8")
    warnings = [line for line in result.err.splitlines() if line.startswith("dsv4: warning:")]
    assert result.code == 0 and len(warnings) == 1
    assert "no multiple of 128" in warnings[0] and "layers.0.ffn.experts.w1.weight [2, 160, 32]" in warnings[0]

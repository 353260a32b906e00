"""MXFP4 experts of a released checkpoint become FP8 without a change of value, or not at all."""

import json
import shutil

import jax
import numpy as np
import pytest

from dsv4.checkpoint import read
from dsv4.checkpoint.agreement import flatten
from dsv4.config import RECIPES, ConfigError
from dsv4.quantize.convert import quantize_checkpoint
from dsv4.quantize.plan import CalibrationRequest
from pallas_kernels.quant import FP8_BLOCK, MXFP4, QuantTensor, dequantize

NAME = "layers.1.ffn.experts.5.w1.scale"


@pytest.fixture(scope="module")
def case(oracle):
    return oracle / "ckpt" / "mixed_fp8fp4"


def test_every_value_stays(case, tmp_path):
    report = quantize_checkpoint(case, tmp_path / "out", RECIPES["fp8"])
    before, after = (flatten(read(path)[1]) for path in (case, tmp_path / "out"))
    assert read(tmp_path / "out")[0].storage.experts == "fp8" and report.layout == "released"
    assert [(each.kind, each.error) for each in report.classes] == [("expert", 0.0)] and report.worst == ()
    converted = 0
    for path, leaf in before.items():
        if isinstance(leaf, QuantTensor) and leaf.format is MXFP4:
            converted += 1
            assert after[path].format is FP8_BLOCK
            np.testing.assert_array_equal(dequantize(after[path]), dequantize(leaf))
        else:
            for old, new in zip(jax.tree.leaves(leaf), jax.tree.leaves(after[path]), strict=True):
                assert np.asarray(old).tobytes() == np.asarray(new).tobytes(), path
    assert converted == 9


def test_what_would_round_is_refused_by_name(case, tools, tmp_path):
    directory = shutil.copytree(case, tmp_path / "source")
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    begin, _ = json.loads(content[8:start])[NAME]["data_offsets"]
    content[start + begin] = 200  # one group 2^70 larger than its neighbours
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"layers.1.ffn.experts.5.w1.weight: tile \(0, 0\).*not exact"):
        quantize_checkpoint(directory, tmp_path / "out", RECIPES["fp8"])
    assert tools.nothing_at(tmp_path / "out")


def test_there_is_nothing_to_calibrate(case, tmp_path):
    (tmp_path / "text").write_text("words")
    with pytest.raises(ConfigError, match="calibration would change nothing"):
        quantize_checkpoint(case, tmp_path / "out", RECIPES["fp8"], calibration=CalibrationRequest(tmp_path / "text"))

"""How much memory a conversion takes, measured in a process of its own."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from dsv4.checkpoint import export
from dsv4.config import load_config
from dsv4.config.layers import parse_layers
from dsv4.parameters import FLOAT32_CLASSES, leaves, model_specs, nest

MEMORY = """
import re, sys
from pathlib import Path
from dsv4.config import RECIPES
from dsv4.quantize.convert import quantize_checkpoint

def status(key):
    return int(re.search(rf"{key}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

quantize_checkpoint("small", sys.argv[2] + "-warm", RECIPES["released"])  # everything lazy is loaded now
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
before = status("VmRSS")
report = quantize_checkpoint(sys.argv[1], sys.argv[2], RECIPES["released"])
print(status("VmHWM") - before, report.bytes_before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure its peak memory")
def test_peak_memory_is_the_largest_leaf_and_little_more(tmp_path):
    """Twelve stacks of experts of 64 MiB each: neither two of them nor one in float32 is ever held."""
    config = load_config("tiny").model
    moe = dataclasses.replace(config.moe, experts=32, per_token=2, expert_width=1024, hash_layers=0)
    config = dataclasses.replace(config, width=1024, layers=parse_layers("window*4"), mtp_blocks=0, moe=moe)
    block = np.random.default_rng(0).standard_normal(1 << 20)

    def draw(spec):
        return np.resize(block, spec.shape).astype(np.float32 if spec.kind in FLOAT32_CLASSES else ml_dtypes.bfloat16)

    params = nest((path, draw(spec)) for path, spec in leaves(model_specs(config)))
    export(SimpleNamespace(config=config, params=params), tmp_path / "source")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "source"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=300,
        env={"JAX_PLATFORMS": "cpu", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    peak, source = map(int, done.stdout.split())
    assert source > 768 * 2**20
    # Beside the leaf: a matrix of 4 MiB in float32 a few times, and what compiling takes.
    assert peak < (64 + 112) * 2**20, f"peak {peak >> 20} MiB"

"""How much memory reading takes, measured in a process of its own."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dsv4.checkpoint import export
from dsv4.config import LayerConfig, read_released
from dsv4.parameters import leaves, model_specs

ORACLE = Path(__file__).parents[1] / "oracle"


MEMORY = """
import re, sys
from pathlib import Path
import jax
from dsv4.checkpoint import read

def status(key):
    return int(re.search(rf"{key}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

with jax.default_device(jax.devices()[1]):
    read(sys.argv[1])  # everything lazy is loaded now
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    _, params = read(sys.argv[2])
embed = params["embed"]["weight"]
assert embed.devices() == {jax.devices()[1]} and not embed.committed
print(status("VmHWM") - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure its peak memory")
def test_peak_memory_is_the_tree_and_little_more(tmp_path):
    """One tensor of 96 MiB dominates: a second copy of it (or its mapped file) would double the peak."""
    config = read_released(ORACLE / "ckpt" / "swa")
    attention = dataclasses.replace(config.attention, o_groups=1, o_lora_rank=96 * 2**20 // 4 // 128)
    config = dataclasses.replace(config, layers=(LayerConfig("window"),), attention=attention, width=8, vocab_size=64)
    params = {}
    for path, spec in leaves(model_specs(config)):
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = np.zeros(spec.shape, np.int32 if spec.kind == "hash" else np.float32)
    big = params["layers"][0]["attn"]["wo_a"]["weight"]
    assert big.nbytes == 96 * 2**20
    export(SimpleNamespace(config=config, params=params), tmp_path / "big")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(ORACLE / "ckpt" / "swa"), str(tmp_path / "big")],
        capture_output=True,
        text=True,
        timeout=120,
        env={"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    peak, tree = map(int, done.stdout.split())
    assert tree > big.nbytes
    # Beside the tree: half a MiB of mapped pages and temporaries a worker, and what threads and compilers keep.
    assert peak < tree + 24 * 2**20, f"peak {peak >> 20} MiB for a tree of {tree >> 20} MiB"

"""`dsv4 info`: the published figures, at once."""

import json
import subprocess
import sys
import time

import pytest

from dsv4.cli.info import schedule
from dsv4.config import load_config
from dsv4.config.overrides import parse_layers


def test_flash(dsv4, tmp_path):
    result = dsv4("info", "flash", "--json", tmp_path / "facts.json")
    assert result.code == 0 and result.err == ""
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert "parameters 284 B total, 13.3 B active per token" in lines
    assert "layers 43: window x2, (csa:4, hca:128) x20, csa:4" in lines
    assert "weights 160 GB: dense fp8, experts fp4, rest bfloat16" in lines
    assert any(line.startswith("bf16 6,880 B 819x smaller 7.21 GB") for line in lines)
    facts = json.loads((tmp_path / "facts.json").read_text())
    per_token = [int(cache["bytes_per_token"]) for cache in facts["cache"].values()]
    assert per_token == [6880, 3850, 3514] and len(facts["layers"]) == 43


def test_overrides_change_what_is_counted(dsv4, tmp_path):
    totals = []
    for experts in (4, 8):
        path = tmp_path / "facts.json"
        assert dsv4("info", "tiny", "--set", f"model.moe.experts={experts}", "--json", path).code == 0
        totals.append(json.loads(path.read_text())["parameters"]["total"])
    config = load_config("tiny").model
    expert = 3 * config.width * config.moe.expert_width + config.width + 1  # weights, router row, router bias
    hashed = 1  # hash-routed layers have no bias
    assert totals[1] - totals[0] == 4 * (len(config.layers) * expert - hashed)


def test_a_checkpoint_directory_or_file_is_a_config(dsv4, released):
    for source in (released, released / "config.json"):
        result = dsv4("info", source)
        assert result.code == 0 and "3: window, csa:4, hca:128" in result.out


def test_a_terminal_gets_a_drawn_table(dsv4, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert "│ parameters" in dsv4("info", "tiny").out


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("window", "window"),
        ("window,csa:4", "window, csa:4"),
        ("hca:8*3", "hca:8 x3"),
        ("hca:128*2,csa:4,hca:128,csa:4,hca:128,csa:4", "hca:128 x2, (csa:4, hca:128) x2, csa:4"),
        ("full,window,full,window,full,window", "(full, window) x3"),
    ],
)
def test_schedules_are_short(layers, expected):
    assert schedule(parse_layers(layers)) == expected


def test_info_is_instant_and_imports_no_jax():
    code = (
        "import sys; from dsv4.cli import main; code = main(['info', 'pro']); "
        "loaded = sys.modules.keys() & {'jax', 'flax', 'numpy'}; print(loaded, file=sys.stderr); sys.exit(code)"
    )
    begin = time.perf_counter()
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    seconds = time.perf_counter() - begin
    assert done.returncode == 0 and done.stderr == "set()\n"
    assert seconds < 3, f"{seconds:.1f} s"

"""`dsv4 train`: what it hands to the training loop."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture
def calls(monkeypatch):
    seen = []

    def train(named, out, *, data, resume, report):
        seen.append((named, out, data, resume))
        report({"step": 10, "loss": 1.25, "tokens_per_second": 1234.5})
        return SimpleNamespace(directory=out / "model", bits_per_byte=2.5, seconds=3.0)

    monkeypatch.setattr("dsv4.training.run.train", train)
    return seen


def test_config_overrides_and_place_are_passed_on(dsv4, calls, tmp_path):
    path = tmp_path / "result.json"
    result = dsv4("train", "tiny", "--set", "train.steps=7", "--out", tmp_path, "--resume", "--json", path)
    assert result.code == 0
    (named, out, data, resume) = calls[0]
    assert (named.name, named.train.steps, out, data, resume) == ("tiny", 7, tmp_path, None, True)
    assert result.err == "step 10, loss 1.25, tokens per second 1234.5\n"
    assert "2.5000 held-out bits per byte" in result.out
    assert json.loads(path.read_text())["bits_per_byte"] == 2.5


def test_runs_have_a_place_by_default(dsv4, calls):
    assert dsv4("train", "tiny").code == 0
    assert calls[0][1] == Path("runs") / "tiny"

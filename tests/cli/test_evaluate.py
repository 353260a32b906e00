"""`dsv4 evaluate`: tables, rows and a figure; what it refuses leaves nothing behind."""

import json
import random
from importlib import metadata

import pytest

import dsv4 as library
from dsv4 import checkpoint
from dsv4.config import RECIPES, apply_overrides, find_recipe, load_config
from dsv4.evaluate.settings import Settings
from dsv4.quantize.weights import quantize_model
from dsv4.training.tokenizer import save_tokenizer, train_tokenizer

OPTIONS = ("--windows", "2", "--length", "32", "--prompts", "0")
CONFIG = apply_overrides(
    load_config("tiny").model,
    ["layers=csa:4", "residual.kind=plain", "residual.streams=1", "mtp_blocks=0", "moe.hash_layers=0"],
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 7))) for _ in range(200)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(" ".join(draw.choices(words, k=9)) for _ in range(40)))
    return path


@pytest.fixture(scope="module")
def plain(text, tmp_path_factory):
    """A 16-bit checkpoint of 320 ids with a tokenizer."""
    folder = tmp_path_factory.mktemp("plain")
    save_tokenizer(train_tokenizer([text.read_text()], CONFIG.vocab_size), folder / "tokenizer.json")
    model = library.init(CONFIG).replace(tokenizer_path=str(folder / "tokenizer.json"))
    checkpoint.save(model, folder / "model")
    return folder / "model"


def test_tables_rows_and_a_figure(dsv4, plain, text, tmp_path):
    jsonl, picture, facts = tmp_path / "rows.jsonl", tmp_path / "figure.png", tmp_path / "facts.json"
    jsonl.write_text('{"recipe": "older"}\n')
    recipes = ("--recipes", "fp8+cache.index=fp4")
    files = ("--jsonl", jsonl, "--plot", picture, "--json", facts)
    result = dsv4("evaluate", plain, *recipes, "--text", text, *OPTIONS, *files)
    assert result.code == 0, result
    for words in ("bits per byte", "more than bf16", "KL", "top-1", "index top-k", "weights", "cache"):
        assert words in result.out
    assert "evaluating: " in result.err
    older, base, row = map(json.loads, jsonl.read_text().splitlines())
    assert (older["recipe"], base["recipe"], row["recipe"]) == ("older", "bf16", "fp8+cache.index=fp4")
    assert base["kl"] == {"value": 0, "low": 0, "high": 0} and row["kl"]["value"] > 0
    assert (row["windows"], row["length"], row["prompts"], row["greedy_equal"]) == (2, 32, 0, None)
    assert {"device", "jax", "dtype", "seed", "tokens", "text_bytes"} <= row.keys()
    assert json.loads(facts.read_text())["rows"][1]["weight_bytes"] == row["weight_bytes"] < base["weight_bytes"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["facts.json", "figure.png", "rows.jsonl"]


def test_a_quantised_checkpoint_is_measured_as_stored(dsv4, plain, text, tmp_path):
    jsonl = tmp_path / "rows.jsonl"
    checkpoint.save(quantize_model(library.load(plain), find_recipe("fp8")), tmp_path / "quantised")
    result = dsv4("evaluate", tmp_path / "quantised", "--text", text, *OPTIONS, "--jsonl", jsonl)
    assert result.code == 0, result
    (row,) = map(json.loads, jsonl.read_text().splitlines())
    assert row["recipe"] == "as stored" and row["bits_per_byte"]["value"] > 0
    assert row["kl"] is None and row["greedy_equal"] is None and row["prompts"] == 0


def test_options_reach_the_measurement(dsv4, plain, text, monkeypatch):
    calls = []

    def evaluate(model, recipes, windows, settings, report):
        calls.append((model, [recipe.name for recipe in recipes], settings))
        return []

    monkeypatch.setattr("dsv4.evaluate.run.evaluate", evaluate)
    monkeypatch.setattr("dsv4.cli.evaluate.print_rows", lambda rows, facts: None)
    sets = ("--set", "execution.prefill_chunk=64", "--set", "model.indexer.top_k=2")
    options = ("--windows", "3", "--length", "32", "--prompts", "4", "--new-tokens", "5")
    assert dsv4("evaluate", plain, "--text", text, *options, *sets).code == 0
    ((model, recipes, settings),) = calls
    assert (model.config.indexer.top_k, model.execution.prefill_chunk) == (2, 64)
    assert recipes == list(RECIPES)
    assert settings == Settings(windows=3, length=32, prompts=4, new_tokens=5)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--recipes", "nope"], 2, "no recipe 'nope': bf16, released, fp8"),
        (["--recipes", "fp8+cache.index=int4"], 2, "cache.index is 'int4'"),
        (["--windows", "0"], 2, "--windows is 0: it must be at least 1"),
        (["--length", "0"], 2, "--length is 0: it must be at least 1"),
        (["--new-tokens", "0"], 2, "--new-tokens is 0"),
        (["--length", "600"], 1, "context of 512"),
        (["--prompts", "2", "--new-tokens", "500"], 1, "model's context of 512"),
        (["--text", "absent.txt"], 1, "no text file at absent.txt"),
        (["--text", "LATIN"], 1, "is not UTF-8 at byte 3"),
        (["--text", "SHORT"], 1, "tokens, one window of 32 needs 33"),
        (["--set", "execution.dtype=int4"], 2, "--set: "),
        (["--set", "execution.cache=fp8"], 2, "belong to recipes"),
        (["--set", "model.width=64"], 2, "other weights than are stored"),
        (["--set", "model.storage.dense=fp8"], 2, "other weights than are stored"),
    ],
)
def test_what_is_refused_leaves_nothing(dsv4, plain, text, tmp_path, options, code, message):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 ...")
    (tmp_path / "short.txt").write_text("abc")
    places = {"LATIN": tmp_path / "latin.txt", "SHORT": tmp_path / "short.txt"}
    out = tmp_path / "out"
    out.mkdir()
    files = ("--jsonl", out / "rows.jsonl", "--plot", out / "figure.png", "--json", out / "facts.json")
    argv = ["--text", text, *OPTIONS, *(places.get(word, word) for word in options)]
    result = dsv4("evaluate", plain, *argv, *files)
    assert result.code == code, result
    assert message in result.err.splitlines()[-1] and result.out == "" and "Traceback" not in result.err
    assert not list(out.iterdir())


def test_recipes_of_a_quantised_checkpoint(fails, released, text):
    message = fails("evaluate", released, "--recipes", "fp8", "--text", text, code=2)
    assert f"{released} is quantised already (dense fp8, experts fp4)" in message


def test_a_checkpoint_without_a_tokenizer(dsv4, plain, text, tmp_path):
    model = library.load(plain).replace(tokenizer_path=None)
    checkpoint.save(model, tmp_path / "bare")
    result = dsv4("evaluate", tmp_path / "bare", "--recipes", "bf16", "--text", text, *OPTIONS)
    assert result.code == 1 and "this model has no tokenizer" in result.err


def test_a_figure_needs_matplotlib(fails, plain, text, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = fails("evaluate", plain, "--text", text, "--plot", tmp_path / "figure.png", code=2)
    assert "uv sync --inexact --extra plots" in message


def test_a_missing_corpus_names_how_to_install_it(fails, plain, monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    assert "uv sync --inexact --extra data" in fails("evaluate", plain, "--text", "held_out")

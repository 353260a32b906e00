"""The training loop end to end: what it leaves, resuming, and what it refuses."""

import json
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import dsv4
from dsv4.checkpoint import is_orbax
from dsv4.config import ConfigError, NamedConfig, apply_overrides, load_config
from dsv4.training import run
from dsv4.training.data import eval_windows
from dsv4.training.errors import DataError
from dsv4.training.held_out import held_out_bits
from dsv4.training.metrics import Metrics, read_metrics
from dsv4.training.prepare import prepare
from dsv4.training.run import default_execution, stored_model, train
from dsv4.training.step import init_state
from dsv4.training.store import StateStore

VOCABULARY = 320
TINY = apply_overrides(
    load_config("tiny"),
    [
        "model.layers=csa:4",
        "train.steps=12",
        "train.length=32",
        "train.optimizer=adamw",
        "train.eval_every=6",
        "train.save_every=6",
        "train.warmup_steps=2",
        "model.residual.sinkhorn_iterations=3",
    ],
)
TIMES = ("seconds", "tokens_per_second")  # all that two equal runs may differ in


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A few kilobytes of made-up words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 7))) for _ in range(200)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(" ".join(draw.choices(words, k=9)) for _ in range(150)))
    return path


@pytest.fixture(scope="module")
def data(text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tokens"
    prepare(folder, VOCABULARY, [text])
    return folder


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """(folder, result, reported rows) of an unbroken run."""
    out, rows = tmp_path_factory.mktemp("runs") / "tiny", []
    return out, train(TINY, out, data=data, report=rows.append), rows


def timeless(rows):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def last_state(named: NamedConfig, out: Path):
    store = StateStore(out / "state")
    abstract = jax.eval_shape(lambda: init_state(named.model, named.train))
    return store.load(store.latest(), abstract)


def equal(a, b) -> bool:
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
    return jax.tree.all(same)


def test_metrics_are_rows_of_finite_numbers(finished):
    out, result, reported = finished
    rows = read_metrics(out / "metrics.jsonl")
    assert rows == reported and [row["step"] for row in rows] == [1, 6, 10, 12]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert ["bits_per_byte" in row for row in rows] == [False, True, False, True]
    assert rows[-1]["bits_per_byte"] == result.bits_per_byte < 8
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_exported_model_is_the_state_as_stored(finished, data):
    out, result, _ = finished
    loaded = dsv4.load(result.directory)
    state = last_state(TINY, out)
    assert int(state.step) == 12 and loaded.config == TINY.model
    assert equal(loaded.params, stored_model(state, TINY.model, default_execution()).params)
    assert equal(loaded.params, result.model.params)
    assert Path(loaded.tokenizer_path).read_bytes() == (data / "tokenizer.json").read_bytes()


def test_the_last_bits_per_byte_are_those_of_the_exported_model(finished, data):
    out, result, _ = finished
    tokens = prepare(data, VOCABULARY)
    windows = eval_windows(tokens.held_out, 32, 16, tokens.token_bytes)
    model = dsv4.load(result.directory, execution=default_execution())
    assert held_out_bits(model, windows) == pytest.approx(result.bits_per_byte, rel=1e-6)


def test_a_resumed_run_is_the_unbroken_one(finished, data, tmp_path):
    out, result, _ = finished
    broken = tmp_path / "broken"
    shutil.copytree(out, broken)
    # As if it had been killed at step 11: state of step 6, metrics up to 10.
    shutil.rmtree(broken / "state" / "12")
    shutil.rmtree(broken / "model")
    lines = (broken / "metrics.jsonl").read_text().splitlines(keepends=True)
    (broken / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    resumed = train(TINY, broken, data=data, resume=True)
    assert equal(last_state(TINY, broken), last_state(TINY, out))
    assert equal(resumed.model.params, result.model.params) and resumed.bits_per_byte == result.bits_per_byte
    assert timeless(read_metrics(broken / "metrics.jsonl")) == timeless(read_metrics(out / "metrics.jsonl"))


def test_a_finished_run_resumed_stays_as_it_is(finished, data):
    out, result, _ = finished
    before = {path: path.read_bytes() for path in (out / "metrics.jsonl", out / "config.json")}
    again = train(TINY, out, data=data, resume=True)
    assert again.bits_per_byte == result.bits_per_byte and again.directory == result.directory
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_is_not_overwritten(finished, data, tmp_path):
    out, *_ = finished
    with pytest.raises(ConfigError, match="holds a run already: pass --resume"):
        train(TINY, out, data=data)
    other = apply_overrides(TINY, ["train.learning_rate=1e-3"])
    with pytest.raises(ConfigError, match="is of another config: resume with the same CONFIG"):
        train(other, out, data=tmp_path / "absent", resume=True)
    assert not (tmp_path / "absent").exists()  # refused before any data is made


@pytest.mark.parametrize(
    ("override", "message"),
    [("model.vocab_size=257", "vocab_size is 257: .* between 258"), ("model.eos_id=7", "eos_id are 0 and 7")],
)
def test_a_vocabulary_without_a_tokenizer_is_refused_first(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        train(apply_overrides(TINY, [override]), tmp_path / "out", texts=[tmp_path / "absent.txt"])
    assert not (tmp_path / "out").exists()


def test_tokens_of_another_vocabulary_or_text_are_refused(data, text, tmp_path):
    with pytest.raises(DataError, match="was prepared with 320 ids, the model has 300"):
        prepare(data, 300)
    (tmp_path / "other.txt").write_text("other\n" * 99)
    with pytest.raises(DataError, match="was prepared from other text"):
        prepare(data, VOCABULARY, [tmp_path / "other.txt"])
    assert len(prepare(data, VOCABULARY, [text]).train) > 1000
    damaged = tmp_path / "damaged"
    shutil.copytree(data, damaged)
    (damaged / "train.npy").write_bytes(b"")
    with pytest.raises(DataError, match="train.npy is no array of tokens"):
        prepare(damaged, VOCABULARY)


def test_the_last_tenth_of_each_text_is_held_out(data, text):
    tokens, whole = prepare(data, VOCABULARY), len(text.read_bytes())
    sizes = [tokens.token_bytes[stream].sum() for stream in (tokens.train, tokens.held_out)]
    assert sum(sizes) == whole and sizes[1] == pytest.approx(whole / 10, abs=1)


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, monkeypatch):
    def make_step(*_):
        def step(state, tokens, attend_all):
            return state, {"loss": np.float32(np.nan)}

        return step

    monkeypatch.setattr(run, "make_step", make_step)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1: lower train.learning_rate"):
        train(TINY, tmp_path, data=data)
    assert not (tmp_path / "model").exists() and read_metrics(tmp_path / "metrics.jsonl") == []


def test_the_dense_control_trains_and_is_kept_as_orbax(data, tmp_path):
    overrides = [
        "model.layers=full*2",
        "model.residual.kind=plain",
        "model.residual.streams=1",
        "model.attention.sink=false",
        "model.moe.hash_layers=0",
        "model.moe.experts=0",
        "model.mtp_blocks=0",
        "train.mtp_weight=0",
        "train.optimizer=muon",
    ]

    plain = apply_overrides(TINY, overrides)
    result = train(plain, tmp_path, data=data)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert is_orbax(result.directory)
    loaded = dsv4.load(result.directory)
    assert loaded.config == plain.model and equal(loaded.params, result.model.params)
    assert loaded.tokenizer_path is not None
    assert dsv4.generate(loaded, "abc", max_new=3) is not None


def test_metrics_drop_what_comes_after_the_resumed_step(tmp_path):
    metrics = Metrics(tmp_path, 0)
    for step in (1, 10, 20):
        metrics.write({"step": step})
    Metrics(tmp_path, 10).write({"step": 11})
    assert [json.loads(line)["step"] for line in metrics.path.read_text().splitlines()] == [1, 10, 11]

"""The training loop: batches in, metrics and checkpoints out, resumable at any saved step.

Every batch is a function of (seed, step), and a checkpoint holds the whole state, so a resumed run repeats what an
unbroken one would have done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv4 import checkpoint
from dsv4.config import ConfigError, Execution, NamedConfig
from dsv4.evaluate.held_out import held_out_bits
from dsv4.model.handle import Model
from dsv4.training.data import Batches, eval_windows
from dsv4.training.metrics import Metrics
from dsv4.training.prepare import Tokens, prepare
from dsv4.training.step import TrainState, init_state, make_step, model_of
from dsv4.training.store import StateStore

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrainResult:
    """What a finished run left: its model, held-out bits per byte, and where it was exported."""

    model: Model
    bits_per_byte: float
    seconds: float
    directory: Path


def train(
    named: NamedConfig,
    out: Path,
    *,
    data: Path | None = None,
    texts: list[Path] | None = None,
    execution: Execution | None = None,
    resume: bool = False,
    report: Report | None = None,
) -> TrainResult:
    """Trains `named` in `out`: metrics.jsonl, config.json, state/ (to resume), model/ (the result).

    data: a folder of `dsv4.training.prepare` (default: out/data, made if absent). execution: how to run (default:
    bfloat16 on a GPU, float32 on a CPU). report: called with each row of metrics. Raises ConfigError where `out`
    holds a run already and `resume` is not set, or a run of another config.
    """
    settings = named.train
    execution = execution or default_execution()
    tokens = prepare(data or out / "data", named.model.vocab_size, texts)
    store = StateStore(out / "state")
    state, first = _start(named, out, store, resume)
    step_fn = make_step(named.model, settings, execution)
    batches = Batches(tokens.train, settings.batch, settings.length, settings.seed)
    metrics = Metrics(out, first)
    windows = eval_windows(tokens.held_out, settings.length, settings.length // 2, tokens.token_bytes)
    bits, begun, mark, marked = float("nan"), time.perf_counter(), time.perf_counter(), first
    for step in range(first, settings.steps):
        state, parts = step_fn(state, batches.batch_at(step), attend_all=step < settings.dense_steps)
        done = step + 1
        evaluate = done % settings.eval_every == 0 or done == settings.steps
        if done % 10 == 0 or evaluate or step == first:
            row = {"step": done, **{name: float(value) for name, value in jax.device_get(parts).items()}}
            now = time.perf_counter()
            row["tokens_per_second"] = (done - marked) * settings.batch * settings.length / (now - mark)
            row["seconds"] = now - begun
            if not np.isfinite(row["loss"]):
                raise FloatingPointError(f"the loss is {row['loss']} at step {done}: lower train.learning_rate")
            if evaluate:
                row["bits_per_byte"] = bits = held_out_bits(_for_evaluation(state, named, execution), windows)
            metrics.write(row)
            if report is not None:
                report(row)
            mark, marked = time.perf_counter(), done
        if done % settings.save_every == 0 or done == settings.steps:
            store.save(done, state)
    return _finish(named, state, tokens, bits, time.perf_counter() - begun, out)


def default_execution() -> Execution:
    """bfloat16 and recomputed blocks on an accelerator, float32 on a CPU."""
    if jax.default_backend() == "cpu":
        return Execution(precision="default")
    return Execution(dtype="bfloat16", precision="default", remat=True)


def _for_evaluation(state: TrainState, named: NamedConfig, execution: Execution) -> Model:
    return model_of(state, named.model, replace(execution, remat=False))


def _start(named: NamedConfig, out: Path, store: StateStore, resume: bool) -> tuple[TrainState, int]:
    """The state to begin from, and its step; writes the config beside the run."""
    record = json.loads(json.dumps({"model": asdict(named.model), "train": asdict(named.train)}))
    path = out / "config.json"
    if path.exists():
        if not resume:
            raise ConfigError(f"{out} holds a run already: pass --resume to go on with it, or another --out")
        if json.loads(path.read_text()) != record:
            raise ConfigError(f"{path} is of another config: resume with the same CONFIG and --set, or another --out")
    else:
        out.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=2) + "\n")
        partial.replace(path)
    if (latest := store.latest()) is None:
        return init_state(named.model, named.train), 0
    abstract = jax.eval_shape(lambda: init_state(named.model, named.train))
    return store.load(latest, abstract), latest


def _finish(
    named: NamedConfig, state: TrainState, tokens: Tokens, bits: float, seconds: float, out: Path
) -> TrainResult:
    """Saves the result: in the released layout where it can express the model, else as an orbax checkpoint."""
    trained = model_of(state, named.model, Execution())
    model = _stored(trained.replace(tokenizer_path=str(tokens.tokenizer_path)))
    directory = out / "model"
    if directory.exists():
        return TrainResult(model, bits, seconds, directory)
    try:
        checkpoint.export(model, directory)
    except ConfigError:
        checkpoint.save(model, directory)
    return TrainResult(model, bits, seconds, directory)


def _stored(model: Model) -> Model:
    """Parameters cast from the float32 masters to what the config's release stores."""
    from dsv4.parameters import FLOAT32_CLASSES
    from dsv4.training.tree import flatten, named_specs, unflatten

    specs, dtype = named_specs(model.config), model.config.storage.dtype
    keep = FLOAT32_CLASSES | {"hash"}
    flat = {
        name: leaf if specs[name].kind in keep else leaf.astype(dtype)
        for name, leaf in flatten(model.config, model.params).items()
    }
    return model.replace(params=unflatten(model.config, flat))

"""The training loop: batches in, metrics and checkpoints out, resumable at any saved step.

Every batch is a function of (seed, step), and a checkpoint holds the whole state, so a resumed run repeats what an
unbroken one would have done.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv4 import checkpoint
from dsv4.config import ConfigError, Execution, ModelConfig, NamedConfig
from dsv4.model.handle import Model
from dsv4.parameters import FLOAT32_CLASSES
from dsv4.training.data import Batches, eval_windows
from dsv4.training.held_out import held_out_bits
from dsv4.training.metrics import Metrics
from dsv4.training.prepare import Tokens, prepare
from dsv4.training.step import TrainState, init_state, make_step, model_of
from dsv4.training.store import StateStore
from dsv4.training.tokenizer import BOS_ID, EOS_ID, LARGEST, SMALLEST
from dsv4.training.tree import named_specs, unflatten

Report = Callable[[dict[str, Any]], None]
LOG_EVERY = 10  # steps between two rows of metrics


@dataclass(frozen=True)
class TrainResult:
    """What a finished run left: the model as stored in `directory`, and the held-out bits per byte of that model."""

    model: Model
    bits_per_byte: float
    seconds: float
    directory: Path


def train(
    named: NamedConfig,
    out: Path,
    *,
    data: Path | None = None,
    texts: Sequence[Path] | None = None,
    execution: Execution | None = None,
    resume: bool = False,
    report: Report | None = None,
) -> TrainResult:
    """Trains `named` in `out`: metrics.jsonl, config.json, state/ (to resume), model/ (the result).

    data: a folder of `dsv4.training.prepare` (default: out/data), made if absent from `texts` (default: the corpus).
    execution: how to run (default: bfloat16 on a GPU, float32 on a CPU). report: called with each row of metrics.
    resume: go on from the last saved step, from the start where there is none. The last bits per byte are those of the
    stored weights, which are rounded to the dtype of the release; earlier ones are of the float32 weights.

    Raises ConfigError where `out` holds a run already and `resume` is not set, or a run of another config, and for a
    vocabulary that has no tokenizer; DataError where the text will not do; FloatingPointError where the loss is not
    finite. Nothing is read or written before the config is known to work.
    """
    settings = named.train
    execution = execution or default_execution()
    _check_vocabulary(named.model)
    _check_run(named, out, resume)
    tokens = prepare(data or out / "data", named.model.vocab_size, texts)
    batches = Batches(tokens.train, settings.batch, settings.length, settings.seed)
    windows = eval_windows(tokens.held_out, settings.length, max(1, settings.length // 2), tokens.token_bytes)
    store = StateStore(out / "state")
    state, first = _start(named, out, store)
    step_fn = make_step(named.model, settings, execution)
    recorder = Recorder(Metrics(out, first), first, settings.batch * settings.length, report)
    bits = None
    for step in range(first, settings.steps):
        state, parts = step_fn(state, batches.batch_at(step), attend_all=step < settings.dense_steps)
        done = step + 1
        last = done == settings.steps
        if done % settings.eval_every == 0 or last:
            model = (stored_model if last else model_of)(state, named.model, execution)
            evaluate = functools.partial(held_out_bits, model, windows)
            bits = recorder.record(done, parts, evaluate)
        elif done % LOG_EVERY == 0 or step == 0:
            recorder.record(done, parts)
        if done % settings.save_every == 0 or last:
            store.save(done, state)
    if bits is None:  # a finished run, resumed
        bits = held_out_bits(stored_model(state, named.model, execution), windows)
    return _finish(named, state, tokens, bits, recorder.seconds(), out)


class Recorder:
    """Turns the metrics of single steps into rows: floats, speed since the last row, a check that they are finite."""

    def __init__(self, metrics: Metrics, first: int, tokens_per_step: int, report: Report | None):
        self._metrics, self._report, self._tokens_per_step = metrics, report, tokens_per_step
        self._begun = self._last_time = time.perf_counter()
        self._last_step = first

    def seconds(self) -> float:
        return time.perf_counter() - self._begun

    def record(self, step: int, parts: dict[str, Any], evaluate: Callable[[], float] | None = None) -> float | None:
        """Writes and reports the row of `step`, with bits per byte if told how to measure them, and returns those.

        The time of an evaluation counts in `seconds` only. Raises FloatingPointError where the loss is not finite.
        """
        row = {"step": step, **{name: float(value) for name, value in jax.device_get(parts).items()}}
        now = time.perf_counter()
        row["tokens_per_second"] = (step - self._last_step) * self._tokens_per_step / (now - self._last_time)
        row["seconds"] = now - self._begun
        if not np.isfinite(row["loss"]):
            raise FloatingPointError(f"the loss is {row['loss']} at step {step}: lower train.learning_rate")
        bits = None
        if evaluate is not None:
            bits = row["bits_per_byte"] = evaluate()
        self._metrics.write(row)
        if self._report is not None:
            self._report(row)
        self._last_time, self._last_step = time.perf_counter(), step
        return bits


def default_execution() -> Execution:
    """bfloat16 on an accelerator, float32 on a CPU."""
    return Execution(dtype="float32" if jax.default_backend() == "cpu" else "bfloat16", precision="default")


def stored_model(state: TrainState, config: ModelConfig, execution: Execution) -> Model:
    """The model a state holds, cast from the float32 masters to what the config's release stores."""
    specs, keep = named_specs(config), FLOAT32_CLASSES | {"hash"}
    flat = {
        name: leaf if specs[name].kind in keep else leaf.astype(config.storage.dtype)
        for name, leaf in {**state.trainable, **state.buffers}.items()
    }
    return Model(config, unflatten(config, flat), execution)


def _check_vocabulary(config: ModelConfig) -> None:
    if not SMALLEST <= config.vocab_size <= LARGEST:
        raise ConfigError(
            f"model.vocab_size is {config.vocab_size}: the tokenizer it is trained with has between {SMALLEST} "
            f"(2 special ids, 256 bytes) and {LARGEST} ids; set e.g. model.vocab_size=2048"
        )
    if (config.bos_id, config.eos_id) != (BOS_ID, EOS_ID):
        raise ConfigError(
            f"model.bos_id and model.eos_id are {config.bos_id} and {config.eos_id}: "
            f"the tokenizer it is trained with has {BOS_ID} and {EOS_ID}; set them to these"
        )


def _check_run(named: NamedConfig, out: Path, resume: bool) -> None:
    """Raises ConfigError where `out` holds a run that may not be touched."""
    path = out / "config.json"
    if not path.exists():
        return
    if not resume:
        raise ConfigError(f"{out} holds a run already: pass --resume to go on with it, or another --out")
    if json.loads(path.read_text()) != _record(named):
        raise ConfigError(f"{path} is of another config: resume with the same CONFIG and --set, or another --out")


def _record(named: NamedConfig) -> dict[str, Any]:
    """What config.json says of a run."""
    return json.loads(json.dumps({"model": asdict(named.model), "train": asdict(named.train)}))


def _start(named: NamedConfig, out: Path, store: StateStore) -> tuple[TrainState, int]:
    """The state to begin from, and how many steps it has seen; writes the config beside the run."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "config.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(_record(named), indent=2) + "\n")
    partial.replace(path)
    if (latest := store.latest()) is None:
        # On a named device, as a loaded state is: a resumed run then finds the programs of the first one.
        return jax.device_put(init_state(named.model, named.train), jax.devices()[0]), 0
    abstract = jax.eval_shape(lambda: init_state(named.model, named.train))
    return store.load(latest, abstract), latest


def _finish(
    named: NamedConfig, state: TrainState, tokens: Tokens, bits: float, seconds: float, out: Path
) -> TrainResult:
    """Saves the result: in the released layout where it can express the model, else as an orbax checkpoint."""
    model = stored_model(state, named.model, Execution()).replace(tokenizer_path=str(tokens.tokenizer_path))
    directory = out / "model"
    if not directory.exists():
        try:
            checkpoint.export(model, directory)
        except ConfigError:
            checkpoint.save(model, directory)
    return TrainResult(model, bits, seconds, directory)

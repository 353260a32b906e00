"""`dsv4 evaluate`: what number formats cost in quality and save in bytes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from dsv4 import __version__
from dsv4.cli import output
from dsv4.cli.app import UsageError
from dsv4.cli.arguments import Checkpoint, JsonFile, Overrides
from dsv4.cli.compilation import keep_compiled_programs
from dsv4.cli.evaluate_table import print_rows
from dsv4.cli.source import checkpoint_config, load_model
from dsv4.config import RECIPES, ConfigError, Execution, ModelConfig, Recipe, apply_overrides, execution_for
from dsv4.extras import how_to_install

if TYPE_CHECKING:
    from dsv4.evaluate.rows import Row
    from dsv4.evaluate.settings import Settings
    from dsv4.model.handle import Model
    from dsv4.training.data import EvalWindows

RowsFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE.jsonl")]
SET_HELP = (
    "Changes how the model runs, or a field of it that no weight depends on: execution.dtype=bfloat16, "
    "execution.implementation=reference, model.indexer.top_k=16."
)
Picture = Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")]


@dataclass(frozen=True)
class Evaluate:
    """Compares a 16-bit checkpoint under several recipes with itself in bf16, on the same text.

    Each recipe is quantised in memory. Measured with 95 % bootstrap intervals, those against bf16 paired by window:
    bits per byte, KL(bf16 || recipe) in nats a token, share of tokens with the same most likely successor, greedy
    continuations (share of equal tokens, tokens before the first that differs), share of bf16's index top-k that is
    chosen too. A quantised checkpoint is measured as it is stored: bits per byte alone.

    examples:
      dsv4 evaluate small --recipes released,fp8 --text held_out
      dsv4 evaluate small --recipes released,released+cache.index=fp4,fp8_per_tensor+rotate=true --text novel.txt
      dsv4 evaluate runs/fp8 --text held_out
    """

    checkpoint: tyro.conf.Positional[Checkpoint]
    text: Annotated[str, tyro.conf.arg(metavar="FILE|held_out")]
    """A UTF-8 file, or held_out for the held-out part of the project's corpus (the `data` extra)."""
    recipes: Annotated[str | None, tyro.conf.arg(metavar="A,B+FIELD=VALUE,...")] = None
    """Names of recipes, each with changes of its fields; all of them unless given. bf16 is always among them."""
    windows: int = 16
    """Windows of text, spread evenly over it; fewer where it has fewer."""
    length: int = 1024
    """Tokens of a window."""
    prompts: int = 16
    """Windows whose beginning (128 tokens) is continued greedily; 0 for none."""
    new_tokens: int = 64
    """Tokens of each continuation."""
    set: Annotated[Overrides, tyro.conf.arg(help=SET_HELP)] = ()
    json: JsonFile = None
    jsonl: RowsFile = None
    """Appends a JSON row for each recipe to this file."""
    plot: Picture = None
    """Draws bits per byte against bytes of weights (the `plots` extra)."""

    def run(self) -> None:
        recipes = self._recipes()
        if self.plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise UsageError(f"--plot needs matplotlib: {how_to_install('plots')}")
        self._check_storage()
        with output.json_file(self.json) as write, _appended(self.jsonl) as append, _replaced(self.plot) as picture:
            from dsv4.evaluate.text import documents

            settings = self._settings()
            texts = documents(self.text)
            keep_compiled_programs()
            model = self._model()
            windows, rows = _evaluate(model, recipes, texts, settings)
            facts = _facts(self, settings, windows, model)
            write(facts | {"rows": [row.facts() for row in rows]})
            append([row.facts() | facts for row in rows])
            if picture is not None:
                from dsv4.evaluate.plot import plot

                plot(rows, picture, f"{self.checkpoint}, {facts['windows']} windows of {self.length} tokens")
        print_rows(rows, facts)

    def _recipes(self) -> list[Recipe]:
        from dsv4.evaluate.variants import parse_recipe

        if self.recipes is None:
            return list(RECIPES.values())
        try:
            return [parse_recipe(text) for text in self.recipes.split(",")]
        except ConfigError as error:
            raise UsageError(f"--recipes: {error}") from error

    def _settings(self) -> Settings:
        from dsv4.evaluate.settings import Settings

        try:
            return Settings(self.windows, self.length, self.prompts, new_tokens=self.new_tokens)
        except ConfigError as error:
            raise UsageError(f"--{str(error).replace('_', '-')}") from error

    def _check_storage(self) -> None:
        """Raises UsageError for recipes of a checkpoint that is quantised already."""
        storage = checkpoint_config(self.checkpoint).storage
        if self.recipes is not None and storage.quantized:
            kept = (f"{name} {form}" for name in ("dense", "experts") if (form := getattr(storage, name)) != "plain")
            raise UsageError(
                f"--recipes: {self.checkpoint} is quantised already ({', '.join(kept) or 'embedding or head'}), and "
                "rounding twice adds error: give the 16-bit checkpoint, or leave --recipes out to measure it as stored"
            )

    def _model(self) -> Model:
        """The checkpoint with --set applied. Raises UsageError where it does not apply."""
        from dsv4.parameters import leaves, model_specs
        from dsv4.training.run import default_execution

        config = checkpoint_config(self.checkpoint)
        base = _Run(config, execution_for(config.storage, default_execution()))
        try:
            run = apply_overrides(base, self.set)
        except ConfigError as error:
            raise UsageError(f"--set: {error}") from error
        if run.model.storage != config.storage or [*leaves(model_specs(run.model))] != [*leaves(model_specs(config))]:
            raise UsageError(f"--set {', '.join(self.set)}: that would be a model of other weights than are stored")
        told = (run.execution.activations, run.execution.cache)
        if not config.storage.quantized and told != (base.execution.activations, base.execution.cache):
            raise UsageError("--set: activations and cache belong to recipes: --recipes bf16+cache=fp8")
        return load_model(self.checkpoint, run.execution).replace(config=run.model)


@dataclass(frozen=True)
class _Run:
    """What --set may change."""

    model: ModelConfig
    execution: Execution


def _evaluate(
    model: Model, recipes: Sequence[Recipe], texts: list[str], settings: Settings
) -> tuple[EvalWindows, list[Row]]:
    from dsv4.evaluate.run import evaluate, evaluate_as_stored
    from dsv4.evaluate.text import model_windows

    windows = model_windows(model, texts, settings.length, settings.windows)
    with output.progress("evaluating") as report:
        if model.config.storage.quantized:
            return windows, [evaluate_as_stored(model, windows, settings, report)]
        return windows, evaluate(model, recipes, windows, settings, report)


def _facts(command: Evaluate, settings: Settings, windows: EvalWindows, model: Model) -> dict[str, Any]:
    """What a row must say to be read without its command line."""
    import jax

    return {
        "checkpoint": command.checkpoint,
        "text": command.text,
        "windows": len(windows),
        "length": settings.length,
        "tokens": int(windows.scored.sum()),
        "text_bytes": int(windows.text_bytes.sum()),
        "prompts": 0 if model.config.storage.quantized else min(settings.prompts, len(windows)),
        "prompt_tokens": min(settings.prompt_tokens, settings.length),
        "new_tokens": settings.new_tokens,
        "resamples": settings.resamples,
        "seed": settings.seed,
        "set": list(command.set),
        "dtype": model.execution.dtype,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "dsv4": __version__,
    }


@contextlib.contextmanager
def _appended(path: Path | None) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """A function that puts rows behind those already in `path` (None: nowhere), all of them or none."""
    if path is None:
        yield lambda rows: None
        return
    with output.replacing(path) as temporary:

        def append(rows: list[dict[str, Any]]) -> None:
            before = path.read_text(encoding="utf-8") if path.exists() else ""
            temporary.write_text(before + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

        yield append


def _replaced(path: Path | None) -> contextlib.AbstractContextManager[Path | None]:
    return contextlib.nullcontext() if path is None else output.replacing(path)

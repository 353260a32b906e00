"""`dsv4 train`: the training loop of dsv4.training.run, from the command line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dsv4.cli import output
from dsv4.cli.arguments import Config, JsonFile, Overrides
from dsv4.cli.compilation import keep_compiled_programs
from dsv4.cli.source import named_config

Directory = Annotated[Path | None, tyro.conf.arg(metavar="DIR")]
Texts = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE ...")]


@dataclass(frozen=True)
class Train:
    """Trains a config from scratch and leaves metrics, resumable state and the exported model in --out.

    It trains on the project's public-domain corpus (in a clone, uv sync --inexact --extra data, without uv
    pip install ".[data]") or on your own text: UTF-8 files, each one document, the last tenth of each held out. A
    tokenizer of model.vocab_size ids is made of the rest. The bits per byte at the end are those of
    the exported weights.

    examples:
      dsv4 train tiny --out runs/tiny
      dsv4 train tiny --text novel.txt letters.txt --out runs/own --set train.steps=500
      dsv4 train small --set train.steps=5000 --set model.moe.experts=16 --out runs/more-experts
      dsv4 train small --out runs/small --resume
    """

    config: Config
    set: Overrides = ()
    out: Directory = None
    """Where the run goes; runs/<name of the config> unless given."""
    data: Directory = None
    """Tokens made by an earlier run or by dsv4.training.prepare; made in --out unless given."""
    text: Texts = ()
    """Train on these UTF-8 text files instead of the corpus."""
    resume: bool = False
    """Continue the run in --out from its last saved step; a run that has saved none begins anew."""
    json: JsonFile = None

    def run(self) -> None:
        named = named_config(self.config, self.set)
        out = self.out or Path("runs") / named.name
        with output.json_file(self.json) as write:
            from dsv4.training.run import train

            keep_compiled_programs()
            with _progress(named.train.steps) as report:
                texts = self.text or None
                result = train(named, out, data=self.data, texts=texts, resume=self.resume, report=report)
            facts = {
                "directory": str(result.directory),
                "bits_per_byte": result.bits_per_byte,
                "seconds": result.seconds,
            }
            write(facts)
        bits, seconds = result.bits_per_byte, result.seconds
        print(f"{result.directory}: {bits:.4f} held-out bits per byte, {seconds:.0f} s")


@contextlib.contextmanager
def _progress(steps: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Takes rows of metrics: a bar with the latest figures on a terminal, a line for each row anywhere else."""
    if not sys.stderr.isatty():
        yield lambda row: print(f"step {row['step']}, {_figures(row)}", file=sys.stderr)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("compiling the first step", total=steps)

        def report(row: dict[str, Any]) -> None:
            bar.update(task, completed=row["step"], description=_figures(row))
            if "bits_per_byte" in row:
                bar.console.print(f"step {row['step']}, {_figures(row)}")

        yield report


def _figures(row: dict[str, Any]) -> str:
    shown = ("loss", "bits_per_byte", "tokens_per_second")
    return ", ".join(f"{name.replace('_', ' ')} {row[name]:.6g}" for name in shown if name in row)

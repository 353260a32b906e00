"""`dsv4 quantize`: a checkpoint under a recipe."""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dsv4.cli import output
from dsv4.cli.app import UsageError
from dsv4.cli.arguments import Checkpoint, JsonFile, Overrides
from dsv4.cli.compilation import keep_compiled_programs
from dsv4.cli.convert import Directory
from dsv4.config import RECIPES, ConfigError, Recipe, apply_overrides

if TYPE_CHECKING:
    from dsv4.quantize.report import Report

SHOWN = 5  # tensors that a warning names


@dataclass(frozen=True)
class Quantize:
    """Writes a checkpoint under a recipe: a number format for each class of tensors.

    Goes leaf by leaf, in the memory of the largest. What is interrupted is continued by the same command. DST must not
    exist, or be empty; it appears when it is complete. Where the released layout has no place for a format, the files
    say so (quant_method "dsv4") and only dsv4 reads them.

    examples:
      dsv4 quantize small small-fp8 --recipe released
      dsv4 quantize small small-int8 --recipe int8 --calibrate text.txt --calibration-method mse
      dsv4 quantize small mixed --recipe fp8 --set dense=int8_row --set activations=int8_row --set outlier_channels=8
    """

    source: tyro.conf.Positional[Annotated[Checkpoint, tyro.conf.arg(metavar="SRC")]]
    destination: Annotated[Directory, tyro.conf.arg(metavar="DST", help="The checkpoint to make.")]
    recipe: Annotated[str, tyro.conf.arg(metavar="R", help=f"One of {', '.join(RECIPES)}.")]
    set: Annotated[
        Overrides,
        tyro.conf.arg(
            help="Changes one field of the recipe: dense=int8_row, experts=fp4, head=fp8_row, activations=int8_row, "
            "rotate=true, outlier_channels=8."
        ),
    ] = ()
    calibrate: Annotated[Path | None, tyro.conf.arg(metavar="TEXT_FILE")] = None
    """UTF-8 text that the model reads, to find static scales of activations and outlier channels; loads the model."""
    calibration_method: Literal["absmax", "percentile", "mse"] = "absmax"
    """absmax: the largest magnitude fits. percentile: 99.99 percent of them do. mse: the least squared error."""
    json: JsonFile = None

    def run(self) -> None:
        recipe = chosen_recipe(self.recipe, self.set)
        from dsv4.quantize.convert import quantize_checkpoint
        from dsv4.quantize.plan import CalibrationRequest

        if recipe.cache != RECIPES[self.recipe].cache:
            _note("the files do not say how a cache is stored: that is chosen when the model runs")
        keep_compiled_programs()
        calibration = self.calibrate and CalibrationRequest(self.calibrate, self.calibration_method)
        with output.json_file(self.json) as write:
            with output.progress(f"quantising {self.source}") as bar:
                report = quantize_checkpoint(
                    self.source,
                    self.destination,
                    recipe,
                    calibration=calibration,
                    progress=lambda what, done, total: bar(done, total),
                    note=_note,
                )
            write(
                {"source": self.source, "destination": str(self.destination), "recipe": recipe.name} | report.as_dict()
            )
        _print(report, self.destination)


def chosen_recipe(name: str, overrides: tuple[str, ...]) -> Recipe:
    """A recipe by name, with fields changed. Raises UsageError naming what there is."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"no recipe {name!r}: {hint}there are {', '.join(RECIPES)}")
    try:
        return apply_overrides(RECIPES[name], overrides)
    except ConfigError as error:
        raise UsageError(f"--set: {error}") from error


def _note(text: str) -> None:
    print(f"dsv4: note: {text}", file=sys.stderr)


def _print(report: Report, destination: Path) -> None:
    rows = [(each.kind, each.format, f"{each.tensors:,}", f"{each.error:.3%}") for each in report.classes]
    output.table(rows, ("class", "format", "tensors", "relative error"))
    if report.worst:
        print()
        output.table([(name, f"{error:.3%}") for name, error in report.worst], ("worst tensors", "relative error"))
    print()
    sizes = output.size(report.bytes_before), output.size(report.bytes_after)
    print(f"{destination}: {sizes[1]}, {report.bytes_after / report.bytes_before:.3f}x of {sizes[0]}")
    print(_layout(report))
    if report.awkward:
        named = ", ".join(report.awkward[:SHOWN])
        more = f" and {len(report.awkward) - SHOWN} more" if len(report.awkward) > SHOWN else ""
        print(
            f"dsv4: warning: FP8 weights with a side above 128 that is no multiple of 128, whose partial blocks other "
            f"implementations are known to get wrong: {named}{more}",
            file=sys.stderr,
        )


def _layout(report: Report) -> str:
    if report.layout == "orbax":
        return "an orbax checkpoint, like its source: config.json cannot carry a research model"
    if report.layout == "released":
        return "the released layout, which other implementations read"
    return f'only dsv4 reads it (quant_method "dsv4"), the released layout lacks: {"; ".join(report.beyond_released)}'

"""`dsv4 doctor`: what is installed, what it runs on, and which implementation of every op that means."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from dsv4 import __version__
from dsv4.cli import output
from dsv4.cli.app import UsageError
from dsv4.cli.arguments import Config, JsonFile, Overrides
from dsv4.cli.compilation import keep_compiled_programs
from dsv4.cli.source import named_config
from dsv4.config import ConfigError
from dsv4.config.recipe import RECIPES, Recipe, find_recipe

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml-dtypes", "numpy", "tokenizers", "tyro")


@dataclass(frozen=True)
class Doctor:
    """Versions, devices, and for every op the implementation that would run, here and elsewhere, and why no faster one.

    What runs depends on shapes and formats, so a prefill chunk and a decode step of CONFIG are traced, with one layer
    of each kind. Nothing is computed and no weight is allocated; other devices are asked for by their properties.

    examples:
      dsv4 doctor
      dsv4 doctor --recipe fp8_per_channel
      dsv4 doctor pro --json doctor.json
    """

    config: Config = "flash"
    set: Overrides = ()
    recipe: Annotated[str | None, tyro.conf.arg(metavar="RECIPE")] = None
    """Formats of weights, activations and cache (released, fp8, int8, ...). Default: what CONFIG is stored in."""
    markdown: bool = False
    """Print the table of devices alone, as Markdown, for RECIPE or for all."""
    json: JsonFile = None

    def run(self) -> None:
        named = named_config(self.config, self.set)
        recipe = None if self.recipe is None else _recipe(self.recipe)
        if self.markdown:
            if self.json is not None:
                raise UsageError("--markdown prints a table and nothing else: leave out --json, or --markdown")
            from dsv4.cli.device_table import markdown

            print(markdown(named.model, RECIPES.values() if recipe is None else [recipe]), end="")
            return
        with output.json_file(self.json) as write:
            from dsv4.cli.device_table import as_text, device_table
            from dsv4.cli.implementations import chosen_implementations, traced_calls

            calls = traced_calls(named.model, recipe)
            table = device_table(named.model, recipe)
            facts = {
                "versions": versions(),
                "devices": devices(),
                "compilation_cache": keep_compiled_programs() or "off",
                "config": named.name,
                "recipe": self.recipe or "as stored",
                "ops": chosen_implementations(calls),
                "table": [dataclasses.asdict(row) for row in table],
            }
            write(facts)
        _print(facts)
        _print_table(*as_text(table), [row.op for row in table if not row.choice])


def _recipe(name: str) -> Recipe:
    try:
        return find_recipe(name)
    except ConfigError as error:
        raise UsageError(f"--recipe: {error}") from error


def versions() -> dict[str, str]:
    """Python, dsv4 and the packages it stands on."""
    found = {"python": platform.python_version(), "dsv4": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def devices() -> list[dict[str, Any]]:
    """The devices jax sees, the first being the default."""
    import jax

    found = []
    for device in jax.devices():
        memory = (device.memory_stats() or {}).get("bytes_limit")  # None on a CPU
        found.append({"platform": device.platform, "kind": device.device_kind, "memory_bytes": memory})
    return found


def _print(facts: dict[str, Any]) -> None:
    output.table(list(facts["versions"].items()), ("", ""), title="versions")
    print()
    rows = [
        (str(i), device["platform"], device["kind"], _memory(device["memory_bytes"]))
        for i, device in enumerate(facts["devices"])
    ]
    output.table(rows, ("device", "platform", "kind", "memory"))
    print(f"\ncompiled programs: {facts['compilation_cache']}\n")
    columns = ("prefill", "decode", "refused")
    rows = [(name, *(", ".join(op[part]) or "-" for part in columns)) for name, op in facts["ops"].items()]
    output.table(rows, ("op", *columns), title=f"here, for {facts['config']} {facts['recipe']} (-: none)")


def _print_table(lines: list[tuple[str, ...]], notes: list[str], alone: list[str]) -> None:
    from pallas_kernels.device import KINDS

    print()
    output.table(lines, ("op", "operands", *KINDS), title="on other devices")
    print("\n".join(notes))
    print(f"reference everywhere, there being no other: {', '.join(dict.fromkeys(alone))}")


def _memory(amount: int | None) -> str:
    return "-" if amount is None else output.size(amount)

"""`dsv4 doctor`: what is installed, what it runs on, and which implementation of every op that means."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass
from typing import Any

from dsv4 import __version__
from dsv4.cli import output
from dsv4.cli.arguments import Config, JsonFile, Overrides
from dsv4.cli.compilation import keep_compiled_programs
from dsv4.cli.source import named_config

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml-dtypes", "numpy", "tokenizers", "tyro")


@dataclass(frozen=True)
class Doctor:
    """Versions, devices, and for every op the implementation that would run here, and why the faster ones would not.

    What runs depends on shapes and formats, so a prefill chunk and a decode step of CONFIG are traced, with one layer
    of each kind. Nothing is computed and no weight is allocated.

    examples:
      dsv4 doctor
      dsv4 doctor pro --json doctor.json
    """

    config: Config = "flash"
    set: Overrides = ()
    json: JsonFile = None

    def run(self) -> None:
        named = named_config(self.config, self.set)
        with output.json_file(self.json) as write:
            from dsv4.cli.implementations import chosen_implementations

            facts = {
                "versions": versions(),
                "devices": devices(),
                "compilation_cache": keep_compiled_programs() or "off",
                "config": named.name,
                "ops": chosen_implementations(named.model),
            }
            write(facts)
        _print(facts)


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
    output.table(rows, ("op", *columns), title=f"implementations for {facts['config']} (-: none)")


def _memory(amount: int | None) -> str:
    return "-" if amount is None else output.size(amount)

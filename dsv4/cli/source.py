"""From what a user names to a config or a model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4.cli.app import UsageError
from dsv4.config import (
    ConfigError,
    Execution,
    ModelConfig,
    NamedConfig,
    apply_overrides,
    execution_for,
    load_config,
    names,
)

if TYPE_CHECKING:
    from dsv4.model.handle import Model

SHIPPED = Path(__file__).resolve().parents[1] / "shipped"
ORBAX_MARKER = "_CHECKPOINT_METADATA"


def named_config(source: str, overrides: Sequence[str] = ()) -> NamedConfig:
    """The config a CONFIG argument means, with overrides.

    Raises UsageError where it names nothing or an override does not apply, ConfigError for a file that is no config.
    """
    named = _named(source)
    for text in overrides:
        if text.partition("=")[0].partition(".")[0].strip() not in ("model", "train"):
            raise UsageError(f"--set {text}: write model.{text}, or train. for how it is trained")
    try:
        return apply_overrides(named, overrides)
    except ConfigError as error:
        raise UsageError(f"--set: {error}") from error


def checkpoint_config(source: str) -> ModelConfig:
    """The config of a CHECKPOINT argument, without its weights. Raises ConfigError."""
    if not Path(source).exists() and not (SHIPPED / source / "config.json").is_file():
        shipped = sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))
        raise ConfigError(f"no checkpoint {source!r}: give a directory, or a shipped model ({', '.join(shipped)})")
    return _load(source).model


def _named(source: str) -> NamedConfig:
    try:
        return _load(source)
    except ConfigError as error:
        if Path(source).exists() or _is_known(source):
            raise
        raise UsageError(str(error)) from error


def _is_known(source: str) -> bool:
    return source in names() or (SHIPPED / source / "config.json").is_file()


def _load(source: str) -> NamedConfig:
    path = Path(source)
    if source not in names() and not path.exists() and _is_known(source):
        path = SHIPPED / source
    if (path / ORBAX_MARKER).is_file():
        return NamedConfig(path.name, _orbax_config(path))
    return load_config(path if path.exists() else source)


def _orbax_config(path: Path):
    from dsv4.checkpoint import config_from_dict

    try:
        metadata = json.loads((path / ORBAX_MARKER).read_text())
        return config_from_dict(metadata["custom_metadata"]["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no checkpoint that dsv4 wrote: {error}") from None


@dataclasses.dataclass(frozen=True)
class _Run:
    """What `--set execution.FIELD=VALUE` changes."""

    execution: Execution


def chosen_execution(config: ModelConfig, overrides: Sequence[str]) -> Execution:
    """How a checkpoint of `config` is run: as it is stored, with overrides. Raises UsageError for a wrong one."""
    try:
        return apply_overrides(_Run(execution_for(config.storage)), overrides).execution
    except ConfigError as error:
        raise UsageError(f"--set: {error}") from error


def load_model(source: str, execution: Execution | None = None) -> Model:
    """The model of a CHECKPOINT argument, with progress on stderr. Raises ConfigError or CheckpointError."""
    from dsv4.api import load
    from dsv4.cli.output import progress

    with progress(f"loading {source}") as report:
        return load(source, execution=execution, progress=report)

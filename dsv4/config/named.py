"""Where a CONFIG on the command line comes from: a name, a Python file, or a released config.json."""

from __future__ import annotations

import difflib
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

from dsv4.config.errors import ConfigError
from dsv4.config.model import ModelConfig
from dsv4.config.released import read_released
from dsv4.config.training import TrainConfig

# The shipped checkpoint that is loaded where none is named: FP8 weights and cache, MXFP4 experts. `small` is the same
# model in 16 bits, to quantise, compare and train on.
DEFAULT_MODEL = "small_released"


@dataclass(frozen=True)
class NamedConfig:
    """A model and how to train it."""

    name: str
    model: ModelConfig
    train: TrainConfig = field(default_factory=TrainConfig)


def config_directory() -> Path:
    """The folder of named configs: package data in an installed wheel, `configs/` in a clone."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_configs"
    return installed if installed.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """The named configs, sorted."""
    return sorted(path.stem for path in config_directory().glob("*.py"))


def load_config(source: str | Path) -> NamedConfig:
    """The config called `source`: a name of `names()`, a Python file with MODEL (and TRAIN), or a config.json.

    Raises ConfigError naming what is wrong and which names exist.
    """
    path = Path(source)
    named = config_directory() / f"{source}.py"
    if str(source).isidentifier() and named.is_file():
        return _from_python(named)
    if path.suffix == ".py" and path.is_file():
        return _from_python(path)
    if path.is_dir() or path.name.endswith(".json"):
        model = read_released(path)
        return NamedConfig(path.stem if path.is_file() else path.name, model)
    near = difflib.get_close_matches(str(source), names(), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"no config {str(source)!r}: {hint}named configs are {', '.join(names())}; "
        "or give a Python file that defines MODEL, a config.json, or a checkpoint directory"
    )


def _from_python(path: Path) -> NamedConfig:
    spec = importlib.util.spec_from_file_location(f"dsv4_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except Exception as error:  # a config is the user's own code: name the file, keep the cause
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
    model, train = getattr(module, "MODEL", None), getattr(module, "TRAIN", TrainConfig())
    if not isinstance(model, ModelConfig) or not isinstance(train, TrainConfig):
        raise ConfigError(f"{path}: define MODEL = ModelConfig(...) and, optionally, TRAIN = TrainConfig(...)")
    return NamedConfig(path.stem, model, train)

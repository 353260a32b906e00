"""ModelConfig <-> plain JSON data, every field, research settings included."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from dsv4.config.errors import ConfigError
from dsv4.config.model import ModelConfig


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """Nested dicts and lists with the names of the dataclass fields."""
    return dataclasses.asdict(config)


def config_from_dict(raw: Any) -> ModelConfig:
    """The inverse of `config_to_dict`, also after a trip through JSON.

    A field that is absent takes its default, so that a config written before a field existed can be read.
    Raises ConfigError naming a field that is unknown, required and absent, or of the wrong type.
    """
    return _build(ModelConfig, raw, "config")


def _build(hint: Any, raw: Any, where: str) -> Any:
    if isinstance(hint, types.UnionType):  # X | None
        options = typing.get_args(hint)
        return None if raw is None and types.NoneType in options else _build(options[0], raw, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(raw, list | tuple):
            raise ConfigError(f"{where} is {raw!r}, expected a list")
        return tuple(_build(typing.get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(raw))
    if dataclasses.is_dataclass(hint):
        return _build_dataclass(typing.cast(type, hint), raw, where)
    # A Literal field holds a string, and its dataclass checks which.
    allowed = {int: (int,), float: (int, float), bool: (bool,)}.get(hint, (str,))
    if not isinstance(raw, allowed) or (isinstance(raw, bool) and hint is not bool):
        raise ConfigError(f"{where} is {raw!r}, expected {' or '.join(t.__name__ for t in allowed)}")
    return raw


def _build_dataclass(cls: type, raw: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} is {raw!r}, expected an object")
    hints, fields = typing.get_type_hints(cls), dataclasses.fields(cls)
    if unknown := sorted(raw.keys() - hints.keys()):
        raise ConfigError(f"{where} has fields this version of dsv4 does not know: {', '.join(unknown)}")
    values = {name: _build(hints[name], value, f"{where}.{name}") for name, value in raw.items()}
    required = (f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING)
    if absent := [name for name in required if name not in raw]:
        raise ConfigError(f"{where} lacks {', '.join(absent)}")
    return cls(**values)

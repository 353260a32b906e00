"""Dotted overrides of frozen configs, shared by `--set`, notebooks and sweeps."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any

from dsv4.config.cache import CACHE_FORMATS, CacheFormat
from dsv4.config.errors import ConfigError, one_of
from dsv4.config.layers import parse_layers
from dsv4.config.model import LayerConfig
from pallas_kernels.formats import FORMATS, FormatError, QuantFormat, parse_format


@dataclasses.dataclass
class Inner:
    """A config and what changes in it: field -> its new value, or the Inner of the config it holds."""

    config: Any
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


def replace[T](config: T, path: str, value: Any) -> T:
    """A copy of `config` with the field at the dotted `path` set; strings are read as the field's type.

    Raises ConfigError naming an unknown field (and the nearest known one) or a value of the wrong type.
    """
    changed = Inner(config)
    _collect(changed, path, value)
    return _rebuilt(changed)


def apply_overrides[T](config: T, overrides: Iterable[str]) -> T:
    """Applies `a.b=value` strings together, so that their order is free; of two for one field the later one counts.

    Raises ConfigError for a malformed one, and for a config that all of them together make invalid.
    """
    changed = Inner(config)
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"override {text!r}: write it as field.name=value")
        _collect(changed, path.strip(), value.strip())
    return _rebuilt(changed)


def _collect(inner: Inner, path: str, value: Any) -> None:
    """Adds one override to `inner`; nothing is validated beyond the type of the value."""
    *outer, last = path.split(".")
    for at, name in enumerate(outer):
        _require_field(inner.config, name)
        held = inner.changes.get(name, getattr(inner.config, name))  # what an earlier override put there counts
        if not isinstance(held, Inner):
            if not dataclasses.is_dataclass(held):
                raise ConfigError(
                    f"{'.'.join(outer[: at + 1])} is {held!r}: it has no field {path.split('.')[at + 1]!r}"
                )
            held = inner.changes[name] = Inner(held)
        inner = held
    _require_field(inner.config, last)
    inner.changes[last] = _coerce(value, typing.get_type_hints(type(inner.config))[last], path)


def _require_field(config: Any, name: str) -> None:
    fields = [field.name for field in dataclasses.fields(config)]
    if name not in fields:
        near = difflib.get_close_matches(name, fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(fields)}"
        raise ConfigError(f"{type(config).__name__} has no field {name!r}{hint}")


def _rebuilt(inner: Inner) -> Any:
    """The config with all changes made, the inner configs first, each validated once."""
    values = {name: _rebuilt(change) if isinstance(change, Inner) else change for name, change in inner.changes.items()}
    return dataclasses.replace(inner.config, **values)


def _coerce(value: Any, hint: Any, name: str) -> Any:
    if hint == tuple[LayerConfig, ...]:
        return _layers(value, name)
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    for option in options:
        matched, converted = _convert(value, option)
        if matched:
            return converted
    allowed = one_of([word for option in options for word in _words(option)])
    choice = any(len(_words(option)) > 1 for option in options)
    raise ConfigError(f"{name} is {value!r}: {allowed if choice else f'expected {allowed}'}")


def _words(option: Any) -> tuple[str, ...]:
    if typing.get_origin(option) is typing.Literal:
        return typing.get_args(option)
    if option in (CacheFormat, QuantFormat):
        return tuple(CACHE_FORMATS if option is CacheFormat else FORMATS)
    return ("None" if option is type(None) else option.__name__,)


def _layers(value: Any, name: str) -> tuple[LayerConfig, ...]:
    if isinstance(value, str):
        return parse_layers(value)
    if isinstance(value, list | tuple) and all(isinstance(layer, LayerConfig) for layer in value):
        return tuple(value)
    raise ConfigError(f"{name} is {value!r}: expected layers, or text such as 'window,csa:4,hca:128*3'")


def _convert(value: Any, option: Any) -> tuple[bool, Any]:
    literal = value
    if isinstance(value, str):
        try:
            literal = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(value.lower(), value))
        except (ValueError, SyntaxError):
            literal = value
    if option is CacheFormat and isinstance(value, str):
        return value in CACHE_FORMATS, CACHE_FORMATS.get(value)
    if option is QuantFormat and isinstance(value, str):
        try:
            return (form := parse_format(value)) is not None, form
        except FormatError:
            return False, None
    if option is type(None):
        return literal is None, None
    if typing.get_origin(option) is typing.Literal:
        return value in typing.get_args(option), value
    if option is float and isinstance(literal, int | float) and not isinstance(literal, bool):
        return True, float(literal)
    if option is int and isinstance(literal, float) and literal.is_integer():
        return True, int(literal)  # 1e4 is a natural way to write a count
    if option is str:
        return isinstance(value, str), value
    matched = isinstance(literal, option) and (option is bool or not isinstance(literal, bool))
    return matched, literal

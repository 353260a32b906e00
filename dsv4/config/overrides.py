"""Dotted overrides of frozen configs, shared by `--set`, notebooks and sweeps."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any

from dsv4.config.model import ConfigError, LayerConfig


def parse_layers(text: str) -> tuple[LayerConfig, ...]:
    """`window,csa:4,hca:128,full`, a `*N` behind a kind repeats it; released integer codes are taken too."""
    layers: list[LayerConfig] = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        word, _, times = word.partition("*")
        kind, _, ratio = word.partition(":")
        try:
            if kind.isdecimal():
                layer = released_layer(int(kind))
            else:
                layer = LayerConfig(typing.cast(Any, kind), int(ratio or 0))
            layers += [layer] * int(times or 1)
        except ValueError as error:
            raise ConfigError(f"layers: cannot read {word!r} ({error}); write e.g. window,csa:4,hca:128*3") from error
    return tuple(layers)


def released_layer(ratio: int) -> LayerConfig:
    """The layer behind one number of the released `compress_ratios`: 0 window, 4 CSA, anything else HCA."""
    if ratio == 0:
        return LayerConfig("window")
    return LayerConfig("csa" if ratio == 4 else "hca", ratio)


def replace[T](config: T, path: str, value: Any) -> T:
    """A copy of `config` with the field at the dotted `path` set; strings are read as the field's type.

    Raises ConfigError naming an unknown field (and the nearest known one) or a value of the wrong type.
    """
    name, _, rest = path.partition(".")
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, config))}
    if name not in fields:
        near = difflib.get_close_matches(name, fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(fields)}"
        raise ConfigError(f"{type(config).__name__} has no field {name!r}{hint}")
    old = getattr(config, name)
    if rest:
        if not dataclasses.is_dataclass(old):
            raise ConfigError(f"{name!r} of {type(config).__name__} is {old!r}: it has no field {rest!r}")
        value = replace(old, rest, value)
    else:
        value = _coerce(value, typing.get_type_hints(type(config))[name], name)
    return dataclasses.replace(typing.cast(Any, config), **{name: value})


def apply_overrides[T](config: T, overrides: Iterable[str]) -> T:
    """Applies `a.b=value` strings in order. Raises ConfigError for a malformed one."""
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"override {text!r}: write it as field.name=value")
        config = replace(config, path.strip(), value.strip())
    return config


def _coerce(value: Any, hint: Any, name: str) -> Any:
    if hint == tuple[LayerConfig, ...]:
        return parse_layers(value) if isinstance(value, str) else tuple(value)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        matched, converted = _convert(value, option)
        if matched:
            return converted
    expected = " or ".join(getattr(o, "__name__", str(o)) for o in options)
    raise ConfigError(f"{name} is {value!r}: expected {expected}")


def _convert(value: Any, option: Any) -> tuple[bool, Any]:
    literal = value
    if isinstance(value, str):
        try:
            literal = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(value.lower(), value))
        except (ValueError, SyntaxError):
            literal = value
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

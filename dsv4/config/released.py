"""Reads the released `config.json`. A checkpoint's own file always wins over any named config.

Everything missing, contradictory or unsupported is one error that says which; unknown keys are named in one warning.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv4.config import released_keys as keys
from dsv4.config.errors import ConfigError
from dsv4.config.model import AttentionConfig, HyperConnectionConfig, IndexerConfig, ModelConfig, MoEConfig, YarnConfig
from dsv4.config.released_schedule import DSPARK, is_dspark, schedule, wrong_schedule
from dsv4.config.released_storage import split_storage, with_section_names
from dsv4.config.released_write import to_released, write_released
from dsv4.config.storage import StorageConfig

__all__ = ["from_released", "read_released", "to_released", "write_released"]

# Dotted group of fields -> its class, the inner ones first.
_GROUPS: dict[str, type] = {
    "attention.yarn": YarnConfig,
    "attention": AttentionConfig,
    "indexer": IndexerConfig,
    "moe": MoEConfig,
    "residual": HyperConnectionConfig,
    "storage": StorageConfig,
}


def read_released(path: str | Path) -> ModelConfig:
    """Reads a `config.json` (or the one in a directory).

    Raises ConfigError listing every missing, contradictory or unsupported key; warns once, naming unknown keys.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: a released checkpoint has a config.json") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds {type(raw).__name__}, expected an object")
    try:
        return from_released(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def from_released(raw: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a released config given as a dict; errors and warnings as `read_released`."""
    if raw.get("model_type") != "deepseek_v4":
        raise ConfigError(
            f"model_type is {raw.get('model_type')!r}: this is another architecture; only 'deepseek_v4' is read"
        )
    if is_dspark(raw):
        raise ConfigError(DSPARK)
    raw, ours, problems = split_storage(raw)
    flat = _flat(raw)
    problems += [*_wrong_objects(raw), *_wrong_fixed(raw, flat), *wrong_schedule(raw), *_wrong_storage(raw)]
    groups = _groups(raw, flat, ours, problems)
    if problems:
        raise ConfigError("; ".join(problems))
    try:
        config = ModelConfig(layers=schedule(raw), **groups[""])
    except ConfigError as error:
        raise ConfigError(_with_released_names(str(error))) from None
    if unknown := sorted(_unknown(raw, flat)):
        warnings.warn(f"config.json keys not known to dsv4, ignored: {', '.join(unknown)}", stacklevel=3)
    return config


def _flat(raw: dict[str, Any]) -> dict[str, Any]:
    """`raw` with the keys of its objects beside its own, dotted."""
    inner = {name: raw[name] for name in keys.SECTIONS if isinstance(raw.get(name), dict)}
    return raw | {f"{name}.{key}": value for name, held in inner.items() for key, value in held.items()}


def _wrong_objects(raw: dict[str, Any]) -> Iterator[str]:
    for name in (*keys.SECTIONS, "compress_rates"):
        if raw.get(name) is not None and not isinstance(raw[name], dict):
            yield f"{name} is {raw[name]!r}, expected an object"


def _wrong_fixed(raw: dict[str, Any], flat: dict[str, Any]) -> Iterator[str]:
    for key, allowed in keys.FIXED.items():
        if key in flat and not keys.is_fixed(flat[key], key):
            yield f"{key} is {flat[key]!r}, only {allowed!r} is supported"
    if isinstance(raw.get("quantization_config"), dict):
        inside = [key for key in keys.FIXED if keys.section(key) == "quantization_config"]
        yield from (f"{key} is missing" for key in inside if key not in flat)
    if isinstance(raw.get("rope_scaling"), dict) and not raw["rope_scaling"].keys() & {"type", "rope_type"}:
        yield "rope_scaling.type is missing, only 'yarn' is supported"


def _wrong_storage(raw: dict[str, Any]) -> Iterator[str]:
    if raw.get("expert_dtype") is not None and raw.get("quantization_config") is None:
        yield f"expert_dtype is {raw['expert_dtype']!r} but there is no quantization_config"
    both = [raw[key] for key in ("dtype", "torch_dtype") if raw.get(key) is not None]
    if len(both) == 2 and both[0] != both[1]:
        yield f"dtype is {both[0]!r} but torch_dtype is {both[1]!r}"


def _groups(
    raw: dict[str, Any], flat: dict[str, Any], ours: dict[str, Any] | None, problems: list[str]
) -> dict[str, dict[str, Any]]:
    """Group of fields -> their values, inner groups built. What is wrong is added to `problems`.

    ours: fields of the storage that a section of our own gave.
    """
    values: dict[str, dict[str, Any]] = {"": {}} | {group: {} for group in _GROUPS}
    broken = {"storage"} if ours is not None and problems else set()
    if ours is not None:
        values["storage"] = dict(ours)
    elif raw.get("quantization_config") is not None:
        values["storage"] = {"dense": "fp8", "experts": "fp8"}
    for name, key in keys.KEYS.items():
        group, _, field = key.field.rpartition(".")
        value, object_ = flat.get(name), keys.section(name)
        if (value is None and not key.required) or (object_ and not isinstance(raw.get(object_), dict)):
            continue
        problem = keys.expected(value, key.kind)
        if problem is None:
            values[group][field] = float(flat[name]) if key.kind is float else value
        else:
            broken.add(group)
            problems.append(f"{name} is {value!r}, {problem}" if name in flat else f"{name} is missing")
    for group, build in _GROUPS.items():
        if group in broken or (group == "attention.yarn" and not values[group]):
            continue
        outer, _, field = group.rpartition(".")
        try:
            values[outer][field] = build(**values[group])
        except ConfigError as error:
            found = str(error) if ours is None else with_section_names(str(error))
            problems.append(_with_released_names(found))
    return values


def _with_released_names(message: str) -> str:
    """A message about our fields in the words of the file it came from."""
    for name, key in keys.KEYS.items():
        start = "" if "." in key.field else "^"
        message = re.sub(rf"{start}(?<![\w.]){re.escape(key.field)}\b", name, message)
    return message


def _unknown(raw: dict[str, Any], flat: dict[str, Any]) -> set[str]:
    known = keys.KEYS.keys() | keys.FIXED.keys() | keys.WRITTEN.keys() | keys.IGNORED | keys.SCHEDULE
    rates = raw.get("compress_rates") or {}
    return (flat.keys() - known - set(keys.SECTIONS)) | {
        f"compress_rates.{name}" for name in rates.keys() - set(keys.LAYER_TYPES.values())
    }

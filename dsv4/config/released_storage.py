"""What the released layout has no key for: `quantization_config` with the method "dsv4".

Its keys are fields of StorageConfig, all of them, strictly; `torch_dtype` stays where it was. Other implementations
refuse a method that they do not know, which is right: they would misread the tensors.
"""

from __future__ import annotations

from typing import Any

from dsv4.config.released_keys import Kind, expected
from dsv4.config.storage import StorageConfig

METHOD = "dsv4"
SECTION = "quantization_config"
# Field -> kind of JSON value. str: the name of a format.
_FIELDS: dict[str, Kind | type[str]] = {
    "dense": str,
    "experts": str,
    "embedding": str,
    "head": str,
    "activations": str,  # or null: what the released code does
    "rotate": bool,
    "outlier_channels": int,
    "static_activations": bool,
}


def storage_section(storage: StorageConfig) -> dict[str, Any]:
    """The `quantization_config` of a storage that is not `released`."""
    return {"quant_method": METHOD} | {name: getattr(storage, name) for name in _FIELDS}


def split_storage(raw: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None, list[str]]:
    """(`raw` without a section of this method, the fields of StorageConfig in it, what is wrong with them).

    The fields are None, and `raw` is as it was, where the section is absent or of another method.
    """
    section = raw.get(SECTION)
    if not isinstance(section, dict) or section.get("quant_method") != METHOD:
        return raw, None, []
    rest = {key: value for key, value in raw.items() if key not in (SECTION, "expert_dtype")}
    problems = [f"{SECTION}.{key} is unknown to the method {METHOD!r}" for key in sorted(section.keys() - _known())]
    if raw.get("expert_dtype") is not None:
        says = f"{SECTION}.experts of the method {METHOD!r} says it"
        problems.append(f"expert_dtype is {raw['expert_dtype']!r}, but {says}: remove one")
    for name, kind in _FIELDS.items():
        if name not in section:
            problems.append(f"{SECTION}.{name} is missing")
        elif (name, section[name]) != ("activations", None) and (problem := _wrong(section[name], kind)):
            problems.append(f"{SECTION}.{name} is {section[name]!r}, {problem}")
    return rest, {name: section.get(name) for name in _FIELDS}, problems


def with_section_names(message: str) -> str:
    """A message about fields of StorageConfig in the words of the file."""
    return message.replace("storage.", f"{SECTION}.")


def _known() -> set[str]:
    return {"quant_method", *_FIELDS}


def _wrong(value: Any, kind: Any) -> str | None:
    if kind is str:
        return None if isinstance(value, str) else "expected the name of a format"
    return expected(value, kind)

"""Does a parameter tree agree with its config, and can config.json carry the config? Asked before writing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv4.checkpoint.layout import StoredLeaf
from dsv4.checkpoint.safetensors import DTYPES
from dsv4.checkpoint.tree import bad_treatment
from dsv4.config.errors import ConfigError
from dsv4.config.model import ModelConfig
from dsv4.config.released import from_released, to_released
from dsv4.config.storage import Treatment
from dsv4.parameters import tensor_name
from pallas_kernels.quant import QuantTensor, TreatedWeight

Tree = dict[tuple[Any, ...], Any]  # path -> leaf
STORED_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def flatten(params: Any, path: tuple[Any, ...] = ()) -> Tree:
    """The leaves of nested dicts by path, in order. A QuantTensor or TreatedWeight is one leaf."""
    if not isinstance(params, dict):
        return {path: params}
    return {at: leaf for key, value in params.items() for at, leaf in flatten(value, (*path, key)).items()}


def require_expressible(config: ModelConfig) -> None:
    """Raises ConfigError for a config the released config.json cannot carry, naming what it would lose."""
    written = from_released(json.loads(json.dumps(to_released(config))))
    if written != config:
        lost = [
            f"{name} {getattr(config, name)} would be read back as {getattr(written, name)}"
            for name in config.__dataclass_fields__
            if getattr(config, name) != getattr(written, name)
        ]
        raise ConfigError(
            f"the released config.json cannot carry this config: {'; '.join(lost)}. "
            "Keep the model as an orbax checkpoint (dsv4.checkpoint.save), or change those fields"
        )


def disagreements(leaves: Sequence[StoredLeaf], tree: Tree) -> dict[str, list[str]]:
    """Kind of problem -> its instances, for a tree that should have exactly `leaves`; empty if it has."""
    expected = {leaf.path: leaf for leaf in leaves}
    wrong = {path: _wrong(leaf, tree[path]) for path, leaf in expected.items() if path in tree}
    problems = {
        "missing parameters": [tensor_name(path) for path in expected if path not in tree],
        "parameters this config does not have": [tensor_name(path) for path in tree if path not in expected],
        "wrong shape, dtype or format": [f"{tensor_name(at)} {text}" for at, text in wrong.items() if text],
    }
    return {kind: found for kind, found in problems.items() if found}


def _wrong(leaf: StoredLeaf, value: Any) -> str | None:
    weight = value.weight if isinstance(value, TreatedWeight) else value
    found = weight.format if isinstance(weight, QuantTensor) else None
    if (found and found.layout) != (leaf.format and leaf.format.layout):
        has, says = (fmt.name if fmt else "not quantised" for fmt in (found, leaf.format))
        return f"is {has}, config.storage says {says}: quantise or dequantise it, or replace config.storage"
    if isinstance(weight, QuantTensor):
        if problems := weight.validate():
            return f"is no {weight.format.name} tensor: {'; '.join(problems)}"
    elif text := _wrong_dtype(leaf, weight.dtype):
        return text
    if tuple(value.shape) != leaf.spec.shape:
        return f"has shape {list(value.shape)}, its config says {list(leaf.spec.shape)}"
    return _wrong_treatment(leaf, value)


def _wrong_treatment(leaf: StoredLeaf, value: Any) -> str | None:
    asked, treated = leaf.treatment or Treatment(), value if isinstance(value, TreatedWeight) else TreatedWeight(value)
    if treated.rotated != asked.rotated:
        return f"is{'' if treated.rotated else ' not'} rotated, config.storage.rotate says otherwise"
    for part in ("input_scale", "channels", "columns"):
        has, says = getattr(treated, part), leaf.parts.get(part)
        if (has is None) != (says is None):
            return f"has {part} {'absent' if has is None else list(has.shape)}, config.storage says otherwise"
        if says and (tuple(has.shape), np.dtype(has.dtype)) != says:
            return f"has {part} {has.dtype} {list(has.shape)}, config.storage says {says[1]} {list(says[0])}"
    problems = bad_treatment(leaf, {part: getattr(treated, part) for part in leaf.parts if hasattr(treated, part)})
    return "; ".join(problems) or None


def _wrong_dtype(leaf: StoredLeaf, dtype: np.dtype) -> str | None:
    if leaf.spec.kind == "hash":
        return None if dtype == np.int32 else f"is {dtype}, hash tables are int32"
    allowed = leaf.tensors[0].dtypes
    if STORED_NAMES.get(np.dtype(dtype)) in allowed:
        return None
    return f"is {dtype}, config.storage says {' or '.join(allowed)}: cast it, or replace config.storage"

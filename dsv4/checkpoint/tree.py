"""Between a leaf of the parameter tree and the arrays it is stored as."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dsv4.checkpoint.layout import Part, StoredLeaf
from pallas_kernels.quant import QuantTensor, TreatedWeight


def assemble(leaf: StoredLeaf, parts: Mapping[str, Any]) -> Any:
    """The array, QuantTensor or TreatedWeight that `parts`, those of `leaf.parts`, make up."""
    if leaf.format is None:
        return parts["values"]
    weight = QuantTensor(parts["values"], parts["scale"], leaf.format)
    if leaf.treatment is None:
        return weight
    extras = (parts.get(name) for name in ("input_scale", "channels", "columns"))
    return TreatedWeight(weight, *extras, rotated=leaf.treatment.rotated)


def part_of(value: Any, part: Part) -> Any:
    """One of the arrays of a leaf: the inverse of `assemble`."""
    if isinstance(value, TreatedWeight):
        return part_of(value.weight, part) if part in ("values", "scale") else getattr(value, part)
    return getattr(value, part) if isinstance(value, QuantTensor) else value


def bad_treatment(leaf: StoredLeaf, parts: Mapping[str, Any]) -> list[str]:
    """What is wrong with the small arrays of a treated weight, each naming the stored tensor."""
    names = {tensor.part: tensor.name for tensor in leaf.tensors}
    found = []
    if "channels" in parts:
        channels, columns = np.asarray(parts["channels"]), leaf.spec.shape[-1]
        if channels[0] < 0 or channels[-1] >= columns or np.any(np.diff(channels) <= 0):
            found.append(f"{names['channels']} is {channels.tolist()}: ascending numbers from 0 to {columns - 1}")
    if "input_scale" in parts and not (scale := np.asarray(parts["input_scale"]).item()) > 0:
        found.append(f"{names['input_scale']} is {scale}: a scale is positive")
    return found

"""Which stored tensors make up each leaf of our tree: names, shapes, types, for one config.

| leaf of kind | stored as |
|---|---|
| quantised | `<name>.weight` codes and `<name>.scale`, one a tile, typed by the format (below) |
| expert | the same, E times: `...experts.<e>.w1.weight`, `.scale` |
| hash | I64, int32 in our tree |
| hyper, hyper_gain, sink, position, bias | F32 |
| anything else | storage.dtype; F32 is accepted beside BF16, since it loses nothing |

| format | codes | scale |
|---|---|---|
| E4M3, E5M2, INT8 | F8_E4M3, F8_E5M2, I8 [out, in] | F8_E8M0, F32 or BF16 by format, [tiles of out, tiles of in] |
| E2M1 | I8 [out, in/2], the even column in the LOW nibble | the same |

What a released checkpoint has is E4M3 in 128 x 128 tiles and, for experts, E2M1 in 1 x 32 groups, scales F8_E8M0.
Treated weights (`StorageConfig.treatment`) have more, which no other implementation reads:

| tensor | stored as |
|---|---|
| `<name>.input_scale` | F32 [1, 1]: `input ~ codes * scale`, one for the whole input |
| `<name>.outlier_channels` | I32 [n], ascending: input channels kept in 16 bits, 0 in the codes |
| `<name>.outlier_columns` | BF16 [out, n]: those columns of the weight, before any rotation |

A stack of experts shares its input: `...experts.w1.input_scale` and `.outlier_channels` once, without an expert number,
and `...experts.<e>.w1.outlier_columns` E times. A rotated weight is stored as it is multiplied: rotated.

The config decides, never the file: a tensor typed otherwise is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np

from dsv4.checkpoint.errors import CheckpointError
from dsv4.config.model import ModelConfig
from dsv4.config.storage import TREATED_CLASSES, Treatment
from dsv4.parameters import FLOAT32_CLASSES, Spec, leaves, model_specs, tensor_name
from pallas_kernels.formats import FP8_BLOCK, QuantFormat

Part = Literal["values", "scale", "input_scale", "channels", "columns"]  # fields of QuantTensor and TreatedWeight
_CODES = {"e4m3": ("F8_E4M3",), "e5m2": ("F8_E5M2",), "int8": ("I8",), "e2m1": ("I8", "U8")}
_SCALES = {"ue8m0": ("F8_E8M0",), "float32": ("F32",), "bfloat16": ("BF16",)}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file. dtypes: safetensors names, any is accepted. expert: its slice of the leaf's `part`."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    part: Part = "values"
    expert: int | None = None


@dataclass(frozen=True)
class StoredLeaf:
    """One leaf of the tree. format: None for a plain array. reason: the config key that decides its type.

    experts: how many the model has, which bounds what a hash table may hold. treatment: of a quantised weight, None for
    a QuantTensor.
    """

    path: tuple[Any, ...]
    spec: Spec
    format: QuantFormat | None
    reason: str
    experts: int
    tensors: tuple[StoredTensor, ...]
    treatment: Treatment | None = None

    @property
    def parts(self) -> dict[Part, tuple[tuple[int, ...], np.dtype | None]]:
        """Part -> (shape, dtype) of its array in the tree; the dtype of a plain float leaf is its file's, None here."""
        shape = self.spec.shape
        if self.format is None:
            return {"values": (shape, np.dtype(np.int32) if self.spec.kind == "hash" else None)}
        found: dict[Part, tuple[tuple[int, ...], np.dtype | None]] = {
            "values": (self.format.values_shape(shape), self.format.values_dtype),
            "scale": (self.format.scale_shape(shape), self.format.scale_dtype),
        }
        if self.treatment and self.treatment.static:
            found["input_scale"] = ((1, 1), np.dtype(np.float32))
        if self.treatment and (count := self.treatment.outliers):
            found["channels"] = ((count,), np.dtype(np.int32))
            found["columns"] = ((*shape[:-1], count), np.dtype(ml_dtypes.bfloat16))
        return found


def stored_leaves(config: ModelConfig, layers: range | None = None) -> Iterator[StoredLeaf]:
    """Every leaf of `config`'s tree in declaration order.

    With `layers`, only those layers, renumbered from 0 in `path`, and what surrounds them, MTP blocks left
    out. Raises CheckpointError for a shape its number format cannot hold (an odd last axis in MXFP4).
    """
    for path, spec in leaves(model_specs(config)):
        stored = path
        if layers is not None and path[0] == "mtp":
            continue
        if layers is not None and path[0] == "layers":
            if path[1] not in layers:
                continue
            path = ("layers", path[1] - layers.start, *path[2:])
        name = tensor_name(stored)
        fmt, reason = quant_format(config, spec)
        treatment = config.storage.treatment(spec.kind, name, spec.shape[-1])
        try:
            tensors = tuple(_tensors(config, name, spec, fmt, treatment))
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}; change the config's sizes or storage") from None
        yield StoredLeaf(path, spec, fmt, reason, config.moe.experts, tensors, treatment)


def quant_format(config: ModelConfig, spec: Spec) -> tuple[QuantFormat | None, str]:
    """The number format of a leaf (None: not quantised), and the config.json key that says so."""
    form = config.storage.format_of(spec.kind)
    if spec.kind == "expert" and config.storage.dense == "fp8" and config.storage.released:
        return form, "expert_dtype"
    return form, "torch_dtype" if form is None and spec.kind not in TREATED_CLASSES else "quantization_config"


def _tensors(
    config: ModelConfig, name: str, spec: Spec, fmt: QuantFormat | None, treatment: Treatment | None
) -> Iterator[StoredTensor]:
    shape = spec.shape[1:] if spec.kind == "expert" else spec.shape
    counted = treatment.outliers if treatment else 0
    for single, expert in _numbered(name, spec):
        if fmt is None:
            yield StoredTensor(single, shape, _plain_dtypes(config, spec), "values", expert)
            continue
        # The Base checkpoints store the scales of 128 x 128 tiles as F32 powers of two: the same scales,
        # unpacked.
        unpacked = ("F32",) if fmt.layout == FP8_BLOCK.layout else ()
        scales = (*_SCALES[fmt.scale], *unpacked)
        yield StoredTensor(single, fmt.values_shape(shape), _CODES[fmt.element], "values", expert)
        yield StoredTensor(_sibling(single, "scale"), fmt.scale_shape(shape), scales, "scale", expert)
        if counted:
            columns = (*shape[:-1], counted)
            yield StoredTensor(_sibling(single, "outlier_columns"), columns, ("BF16",), "columns", expert)
    if counted:
        yield StoredTensor(_sibling(name, "outlier_channels"), (counted,), ("I32",), "channels")
    if treatment and treatment.static:
        yield StoredTensor(_sibling(name, "input_scale"), (1, 1), ("F32",), "input_scale")


def _numbered(name: str, spec: Spec) -> list[tuple[str, int | None]]:
    """`...experts.w1.weight` stacks `...experts.<e>.w1.weight`; any other leaf is one tensor."""
    if spec.kind != "expert":
        return [(name, None)]
    before, _, after = name.partition(".experts.")
    return [(f"{before}.experts.{e}.{after}", e) for e in range(spec.shape[0])]


def _sibling(name: str, part: str) -> str:
    return name.removesuffix("weight") + part


def _plain_dtypes(config: ModelConfig, spec: Spec) -> tuple[str, ...]:
    if spec.kind == "hash":
        return ("I64",)
    if spec.kind in FLOAT32_CLASSES or config.storage.dtype == "float32":
        return ("F32",)
    return ("BF16", "F32")

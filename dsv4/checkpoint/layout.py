"""Which stored tensors make up each leaf of our tree: names, shapes, types, for one config.

| leaf of kind | stored as |
|---|---|
| dense, storage.dense "fp8" | `<name>.weight` F8_E4M3 and `<name>.scale` F8_E8M0, one a 128 x 128 tile |
| expert, storage.experts "fp8" | the same, E times: `...experts.<e>.w1.weight`, `.scale` |
| expert, storage.experts "fp4" | `.weight` I8 [out, in/2], `.scale` F8_E8M0 [out, in/32], E times |
| hash | I64, int32 in our tree |
| hyper, hyper_gain, sink, position, bias | F32 |
| anything else | storage.dtype; F32 is accepted beside BF16, since it loses nothing |

The config decides, never the file: a tensor typed otherwise is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from dsv4.checkpoint.errors import CheckpointError
from dsv4.config.model import ModelConfig
from dsv4.parameters import FLOAT32_CLASSES, Spec, leaves, model_specs, tensor_name
from pallas_kernels.quant import QuantFormat


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file. dtypes: safetensors names, any is accepted. expert: its slice of the leaf."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    part: Literal["values", "scale"] = "values"
    expert: int | None = None


@dataclass(frozen=True)
class StoredLeaf:
    """One leaf of the tree. format: None for a plain array. reason: the config key that decides its type.

    experts: how many the model has, which bounds what a hash table may hold.
    """

    path: tuple[Any, ...]
    spec: Spec
    format: QuantFormat | None
    reason: str
    experts: int
    tensors: tuple[StoredTensor, ...]


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
        fmt, reason = quant_format(config, spec)
        try:
            tensors = tuple(_tensors(config, tensor_name(stored), spec, fmt))
        except ValueError as error:
            raise CheckpointError(f"{tensor_name(stored)}: {error}; change the config's sizes or storage") from None
        yield StoredLeaf(path, spec, fmt, reason, config.moe.experts, tensors)


def quant_format(config: ModelConfig, spec: Spec) -> tuple[QuantFormat | None, str]:
    """The number format of a leaf (None: not quantised), and the config.json key that says so."""
    form = config.storage.format_of(spec.kind)
    if spec.kind == "expert" and config.storage.dense == "fp8":
        return form, "expert_dtype"
    return form, "torch_dtype" if form is None and spec.kind not in ("dense", "expert") else "quantization_config"


def _tensors(config: ModelConfig, name: str, spec: Spec, fmt: QuantFormat | None) -> Iterator[StoredTensor]:
    numbered = [(name, None)]
    if spec.kind == "expert":  # ...experts.w1.weight stacks ...experts.<e>.w1.weight
        before, _, after = name.partition(".experts.")
        numbered = [(f"{before}.experts.{e}.{after}", e) for e in range(spec.shape[0])]
    shape = spec.shape[1:] if spec.kind == "expert" else spec.shape
    for single, expert in numbered:
        if fmt is None:
            yield StoredTensor(single, shape, _plain_dtypes(config, spec), "values", expert)
            continue
        # The Base checkpoints store the scales of 128 x 128 tiles as F32 powers of two: the same scales,
        # unpacked.
        codes, scales = (("I8", "U8"), ("F8_E8M0",)) if fmt.element == "e2m1" else (("F8_E4M3",), ("F8_E8M0", "F32"))
        sibling = single.removesuffix("weight") + "scale"
        yield StoredTensor(single, fmt.values_shape(shape), codes, "values", expert)
        yield StoredTensor(sibling, fmt.scale_shape(shape), scales, "scale", expert)


def _plain_dtypes(config: ModelConfig, spec: Spec) -> tuple[str, ...]:
    if spec.kind == "hash":
        return ("I64",)
    if spec.kind in FLOAT32_CLASSES or config.storage.dtype == "float32":
        return ("F32",)
    return ("BF16", "F32")

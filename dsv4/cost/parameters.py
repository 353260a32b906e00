"""How many parameters a config has, how many of them one token uses, and the bytes they take on disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from dsv4.config import ModelConfig, StorageConfig
from dsv4.config.storage import Treatment
from dsv4.parameters import FLOAT32_CLASSES, Spec, leaves, model_specs, tensor_name

HASH_BYTES = 8  # released hash tables are int64


@dataclass(frozen=True)
class ParameterCount:
    """total: of the model without its MTP blocks, hash tables not counted. active: those one token is multiplied by.

    mtp: of the multi-token prediction blocks, which share the embedding and the head.
    """

    total: int
    active: int
    mtp: int


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Counts from the declared shapes.

    Of E routed experts a token uses k. It reads one row of the input embedding, so that table is not active.
    """
    total = mtp = 0
    active = Fraction(0)
    for path, spec in leaves(model_specs(config)):
        if spec.kind == "hash":
            continue
        if path[0] == "mtp":
            mtp += spec.size
            continue
        total += spec.size
        if spec.kind == "expert":
            active += Fraction(spec.size * config.moe.per_token, config.moe.experts)
        elif spec.kind != "embedding":
            active += spec.size
    return ParameterCount(total, int(active), mtp)


def weight_bytes(config: ModelConfig) -> int:
    """Bytes of every tensor, MTP blocks and hash tables included, as `config.storage` keeps them."""
    return sum(_stored_bytes(tensor_name(path), spec, config.storage) for path, spec in leaves(model_specs(config)))


def _stored_bytes(name: str, spec: Spec, storage: StorageConfig) -> int:
    if spec.kind == "hash":
        return spec.size * HASH_BYTES
    if spec.kind in FLOAT32_CLASSES:
        return spec.size * 4
    form = storage.format_of(spec.kind)
    if form is None:
        return spec.size * (4 if storage.dtype == "float32" else 2)
    return form.nbytes(spec.shape) + _treatment_bytes(storage.treatment(spec.kind, name, spec.shape[-1]), spec)


def _treatment_bytes(treatment: Treatment | None, spec: Spec) -> int:
    """A float32 scale of the input, int32 channel numbers, and their columns in 16 bits (of every expert)."""
    if treatment is None:
        return 0
    columns = math.prod(spec.shape[:-1]) * treatment.outliers * 2
    return 4 * treatment.static + 4 * treatment.outliers + columns

"""What a conversion cost in precision and saved in bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv4.checkpoint.layout import StoredLeaf
from dsv4.checkpoint.safetensors_write import Planned
from dsv4.quantize.leaf import WORST, LeafError, relative
from dsv4.quantize.plan import Plan, awkward_shapes
from pallas_kernels.formats import format_name


@dataclass(frozen=True)
class ClassReport:
    """One tensor class in one format. error: rms(weight - dequantised) / rms(weight) over all of it."""

    kind: str
    format: str
    tensors: int
    error: float


@dataclass(frozen=True)
class Report:
    """worst: (tensor, relative error), the largest first. beyond_released: fields that only dsv4 reads, with reasons.

    awkward: weights whose shape other implementations are known to get wrong. layout: released, dsv4 or orbax.
    """

    layout: str
    beyond_released: tuple[str, ...]
    classes: tuple[ClassReport, ...]
    worst: tuple[tuple[str, float], ...]
    bytes_before: int
    bytes_after: int
    awkward: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def leaf_facts(leaf: StoredLeaf, error: LeafError) -> dict[str, Any]:
    """What the journal notes of a finished leaf: JSON data, from which a continued run makes the same report."""
    if leaf.format is None or not error.worst:  # as it was
        return {}
    return {
        "kind": leaf.spec.kind,
        "format": format_name(leaf.format),
        "tensors": leaf.spec.shape[0] if leaf.spec.kind == "expert" else 1,
        "lost": error.lost,
        "total": error.total,
        "worst": error.worst,
    }


def report_of(plan: Plan, facts: Mapping[str, Mapping[str, Any]]) -> Report:
    """The report of a finished conversion from the facts of all its leaves."""
    storage = plan.config.storage
    quantised = [found for found in facts.values() if found]
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for found in quantised:
        groups.setdefault((found["kind"], found["format"]), []).append(found)
    classes = tuple(
        ClassReport(
            kind,
            form,
            sum(found["tensors"] for found in group),
            relative(sum(found["lost"] for found in group), sum(found["total"] for found in group)),
        )
        for (kind, form), group in groups.items()
    )
    matrices = [(name, relative(lost, total)) for found in quantised for name, lost, total in found["worst"]]
    matrices = sorted(matrices, key=lambda entry: -entry[1])[:WORST]
    own = "released" if storage.released else "dsv4"
    return Report(
        "orbax" if plan.research else own,
        storage.beyond_released,
        classes,
        tuple(entry for entry in matrices if entry[1] > 0),
        _source_bytes(plan),
        sum(tensor.nbytes for tensor in plan.tensors),
        tuple(awkward_shapes(plan.leaves)),
    )


def _source_bytes(plan: Plan) -> int:
    return sum(leaf_bytes(plan, leaf) for leaf in plan.leaves)


def leaf_bytes(plan: Plan, leaf: StoredLeaf) -> int:
    """Bytes of a leaf in the source, in the files' types."""
    stored = plan.source.leaves[leaf.path]
    own = plan.source.dtype(stored)
    return sum(
        Planned(tensor.name, tensor.dtypes[0] if stored.format else own, tensor.shape).nbytes
        for tensor in stored.tensors
    )

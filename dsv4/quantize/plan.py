"""What a conversion will make of a checkpoint: checked as a whole, before anything is computed or written."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv4.checkpoint.agreement import require_expressible
from dsv4.checkpoint.config_json import config_to_dict
from dsv4.checkpoint.layout import StoredLeaf, stored_leaves
from dsv4.checkpoint.safetensors_write import Planned
from dsv4.checkpoint.writer import require_vacant
from dsv4.config import ConfigError, Execution, ModelConfig, StorageConfig
from dsv4.config.recipe import Recipe
from dsv4.config.storage import QUANTIZED_CLASSES
from dsv4.model.handle import Model
from dsv4.parameters import tensor_name
from dsv4.quantize.calibrate import has_static_scales, text_windows
from dsv4.quantize.source import Source, source_files
from dsv4.quantize.static_scale import Method


@dataclass(frozen=True)
class CalibrationRequest:
    """text: a UTF-8 file. method: how a static scale is chosen."""

    text: Path
    method: Method = "absmax"


@dataclass(frozen=True)
class Plan:
    """config, leaves: of the result. exact: experts go from MXFP4 to FP8 blocks and nothing else changes.

    windows: token ids int32 [N, T] to calibrate on, None for no calibration. identity: what an unfinished run must
    have in common with this one to be continued. research: config.json cannot carry the model, orbax can.
    """

    source: Source
    destination: Path
    recipe: Recipe
    config: ModelConfig
    leaves: tuple[StoredLeaf, ...]
    exact: bool
    method: Method
    windows: np.ndarray | None
    identity: dict[str, Any]
    research: bool

    @property
    def tokenizer(self) -> Path | None:
        return _tokenizer(self.source)

    @property
    def tensors(self) -> list[Planned]:
        """Every tensor of the result, as it will be stored."""
        return [
            Planned(tensor.name, tensor.dtypes[0] if leaf.format else self._own_dtype(leaf), tensor.shape)
            for leaf in self.leaves
            for tensor in leaf.tensors
        ]

    def _own_dtype(self, leaf: StoredLeaf) -> str:
        return self.source.dtype(self.source.leaves[leaf.path])


def make_plan(source: Source, destination: Path, recipe: Recipe, calibration: CalibrationRequest | None) -> Plan:
    """Raises ConfigError for a recipe that cannot be applied, naming the tensor, or a source that is quantised already;
    CheckpointError for a destination that is not vacant; InputError for a text that cannot be used.
    """
    if source.directory.resolve() == destination.resolve():
        raise ConfigError(f"{destination} is the checkpoint to read: name another directory for the result")
    require_vacant(destination)
    static = calibration is not None and has_static_scales(recipe)
    before, after = source.config.storage, recipe.storage(source.config.storage, static=static)
    exact = _is_exact(before, after)
    if not after.quantized:
        raise ConfigError(f"recipe {recipe.name!r} quantises nothing: give it a format for dense, experts or another")
    if before.quantized and not exact:
        raise ConfigError(_refusal(source))
    if exact and calibration is not None:
        raise ConfigError("calibration would change nothing: these experts are converted without rounding")
    config = dataclasses.replace(source.config, storage=after)
    _require_shapes(source, after)
    leaves = tuple(stored_leaves(config))
    windows = None
    if calibration is not None:
        tokenizer = _tokenizer(source)
        windows = text_windows(Model(config, {}, Execution(), tokenizer and str(tokenizer)), calibration.text)
    identity = {
        "source": str(source.directory.resolve()),
        "files": source_files(source),
        "config": config_to_dict(config),
        "recipe": repr(recipe),
        "calibration": calibration and [calibration.method, hashlib.sha256(calibration.text.read_bytes()).hexdigest()],
    }
    method = calibration.method if calibration else "absmax"
    research = source.whole and not _expressible(config)
    return Plan(source, destination, recipe, config, leaves, exact, method, windows, identity, research)


def _require_shapes(source: Source, after: StorageConfig) -> None:
    """Raises ConfigError naming the first tensor that its format cannot hold."""
    for leaf in source.leaves.values():
        form = after.format_of(leaf.spec.kind)
        if form is not None and (reason := form.unsupported_reason(leaf.spec.shape)):
            field = QUANTIZED_CLASSES[leaf.spec.kind]
            raise ConfigError(
                f"{tensor_name(leaf.path)} cannot be {form.name}: {reason}; choose another format for {field}"
            )


def awkward_shapes(leaves: tuple[StoredLeaf, ...]) -> list[str]:
    """Weights in FP8 blocks with a side above 128 that is no multiple of it, so that the last block is a partial one.

    transformers 5.23.0 loads them and computes other logits, without an error, as soon as the scales of the two blocks
    differ (tests/test_other_quantized.py).
    """
    return [
        f"{tensor_name(leaf.path)} {list(leaf.spec.shape)}"
        for leaf in leaves
        if leaf.format is not None
        and leaf.format.tile == (128, 128)
        and any(side > 128 and side % 128 for side in leaf.spec.shape[-2:])
    ]


def _is_exact(before: StorageConfig, after: StorageConfig) -> bool:
    """Whether only experts change, from MXFP4 to FP8 blocks."""
    dtype = before.dtype
    return before == StorageConfig(dtype, "fp8", "fp4") and after == StorageConfig(dtype, "fp8", "fp8")


def _refusal(source: Source) -> str:
    leaf = next(leaf for leaf in source.leaves.values() if leaf.format is not None)
    assert leaf.format is not None
    return (
        f"{source.directory} is quantised already ({tensor_name(leaf.path)} is {leaf.format.name}): start from the "
        "16-bit checkpoint, rounding twice adds error. Only MXFP4 experts beside FP8 weights are converted, by fp8"
    )


def _expressible(config: ModelConfig) -> bool:
    """Raises nothing: a research model in an orbax checkpoint is converted to another one."""
    try:
        require_expressible(config)
    except ConfigError:
        return False
    return True


def _tokenizer(source: Source) -> Path | None:
    path = source.directory / "tokenizer.json"
    return path if path.is_file() else None

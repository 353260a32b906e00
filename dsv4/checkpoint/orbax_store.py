"""Checkpoints of our own, through orbax: any ModelConfig and any dtype, research models included.

One tree of plain arrays is stored under our names; a QuantTensor becomes `{"values", "scale"}`, a TreatedWeight
`{"weight", "input_scale", "channels", "columns"}` without those it has not. The config, the format of every QuantTensor
and whether a TreatedWeight is rotated travel in the checkpoint's custom metadata, so that a directory is all `restore`
needs.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dsv4.checkpoint.config_json import config_from_dict, config_to_dict
from dsv4.checkpoint.errors import CheckpointError
from dsv4.checkpoint.writer import Model, replacing, require_vacant
from dsv4.config.errors import ConfigError
from dsv4.config.model import ModelConfig
from dsv4.parameters import tensor_name
from pallas_kernels.device import default_device
from pallas_kernels.formats import FormatError, parse_format
from pallas_kernels.quant import QuantTensor, TreatedWeight

KIND, VERSIONS = "dsv4", (1, 2)  # 2 has treated weights, and is written only where there are any
_PARTS = ("weight", "input_scale", "channels", "columns")  # of a TreatedWeight, those it has


def save(model: Model, directory: str | Path) -> None:
    """Writes `model.config` and `model.params` (nested dicts of arrays and quantised weights), whole or not at all.

    `model.tokenizer_path`, a file, is copied to tokenizer.json where it exists and is not None.

    Raises CheckpointError if `directory` is not vacant, for a leaf or key that cannot be stored, or if
    writing fails.
    """
    with _quiet():
        from orbax.checkpoint import v1 as ocp

    path = Path(directory).expanduser().absolute()
    require_vacant(path)
    notes = _Notes({}, {})
    tree = _encode(model.params, (), notes)
    metadata = {"kind": KIND, "version": 1, "config": config_to_dict(model.config), "formats": notes.formats}
    if notes.rotated:
        metadata |= {"version": 2, "rotated": notes.rotated}
    tokenizer = getattr(model, "tokenizer_path", None)
    try:
        with _quiet(), replacing(path) as new:
            ocp.save(str(new), tree, custom_metadata=metadata)
            if tokenizer is not None:
                shutil.copyfile(tokenizer, new / "tokenizer.json")
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"cannot write {path}, nothing was left there: {error}") from error


def restore(directory: str | Path) -> tuple[ModelConfig, dict[Any, Any]]:
    """(config, params) as `save` was given them, bit for bit, on jax's default device.

    Raises CheckpointError for a directory that `save` did not write, or that is damaged; ConfigError for a
    config of a later version.
    """
    with _quiet():
        from orbax.checkpoint import v1 as ocp

    path = Path(directory).expanduser().absolute()
    if not is_orbax(path):
        raise CheckpointError(f"{path} is no orbax checkpoint; dsv4.checkpoint.read reads released ones")
    sharding = jax.sharding.SingleDeviceSharding(default_device())
    try:
        with _quiet():
            found = ocp.metadata(str(path))
            ours: Any = found.custom_metadata or {}
            if ours.get("kind") != KIND or ours.get("version") not in VERSIONS:
                raise CheckpointError(
                    f"{path} was not written by dsv4.checkpoint.save (version {VERSIONS[-1]} or less): it has kind "
                    f"{ours.get('kind')!r}, version {ours.get('version')!r}"
                )
            config = config_from_dict(ours["config"])
            # Without shardings orbax would look for the devices the checkpoint was written from.
            abstract = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), found.metadata
            )
            tree = ocp.load(str(path), abstract)
            return config, _decode(tree, (), _Notes(ours["formats"], ours.get("rotated", {})))
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:  # orbax and tensorstore raise many types for a damaged checkpoint
        raise CheckpointError(f"{path} cannot be restored: {type(error).__name__}: {error}") from error


def is_orbax(directory: str | Path) -> bool:
    """Whether `directory` is a finished orbax checkpoint."""
    return (Path(directory) / "_CHECKPOINT_METADATA").is_file()


class _Notes(NamedTuple):
    """What the arrays do not say, by name: formats of QuantTensors, and of TreatedWeights whether they are rotated."""

    formats: dict[str, str]
    rotated: dict[str, bool]


def _encode(node: Any, path: tuple[Any, ...], notes: _Notes) -> Any:
    """The tree with str keys and plain arrays; adds to `notes`."""
    if isinstance(node, TreatedWeight):
        notes.rotated[tensor_name(path)] = node.rotated
        node = {part: value for part in _PARTS if (value := getattr(node, part)) is not None}
        return {part: _encode(value, (*path, part), notes) for part, value in node.items()}
    if isinstance(node, QuantTensor):
        notes.formats[tensor_name(path)] = node.format.name
        node = {"values": node.values, "scale": node.scale}
        return {part: _encode(array, (*path, part), notes) for part, array in node.items()}
    if isinstance(node, dict) and node:
        names = all(isinstance(key, str) and not key.isdecimal() for key in node)
        if not names and not all(type(key) is int and key >= 0 for key in node):
            raise CheckpointError(f"keys {list(node)} under {tensor_name(path)!r}: all must be names, or all ints >= 0")
        return {str(key): _encode(value, (*path, key), notes) for key, value in node.items()}
    if not isinstance(node, jax.Array | np.ndarray) or not node.size:
        raise CheckpointError(f"{tensor_name(path)} is {node!r:.80}: only non-empty arrays can be stored")
    array = jax.device_put(node)
    if array.dtype != node.dtype:
        raise CheckpointError(f"{tensor_name(path)} is {node.dtype}, jax makes it {array.dtype}: cast it")
    return array


def _decode(node: Any, path: tuple[Any, ...], notes: _Notes) -> Any:
    if (rotated := notes.rotated.get(tensor_name(path))) is not None:
        return TreatedWeight(**{part: _decode(node[part], (*path, part), notes) for part in node}, rotated=rotated)
    if (name := notes.formats.get(tensor_name(path))) is not None:
        try:
            form = parse_format(name)
        except FormatError as error:
            raise CheckpointError(f"{tensor_name(path)}: {error}") from None
        assert form is not None, "only quantised leaves are noted"
        return QuantTensor(node["values"], node["scale"], form)
    if isinstance(node, dict):
        decoded = {key: _decode(value, (*path, key), notes) for key, value in node.items()}
        if all(map(str.isdecimal, decoded)):  # layers; orbax sorts them as text
            return {int(key): decoded[key] for key in sorted(decoded, key=int)}
        return decoded
    return node


@contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs every step, its import too, through absl; only errors are worth a line."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

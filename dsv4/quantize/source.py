"""Where a conversion takes its leaves from: a released directory, one leaf at a time, or an orbax one, as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dsv4 import checkpoint
from dsv4.checkpoint.agreement import STORED_NAMES, disagreements, flatten
from dsv4.checkpoint.errors import CheckpointError
from dsv4.checkpoint.layout import StoredLeaf, stored_leaves
from dsv4.checkpoint.reader import open_files, read_leaf
from dsv4.checkpoint.safetensors import SafetensorsFile
from dsv4.checkpoint.tree import part_of
from dsv4.config import ModelConfig
from dsv4.parameters import nest


class Source(Protocol):
    """A checkpoint to convert, checked as a whole. leaves: by path, in order. whole: it is in memory already."""

    @property
    def whole(self) -> bool: ...

    @property
    def directory(self) -> Path: ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def leaves(self) -> Mapping[tuple[Any, ...], StoredLeaf]: ...

    def dtype(self, leaf: StoredLeaf) -> str:
        """The safetensors type of a leaf's values."""
        ...

    def read(self, leaf: StoredLeaf) -> dict[str, np.ndarray]:
        """The arrays of a leaf on the host, by part."""
        ...

    def params(self) -> dict[Any, Any]:
        """The whole tree, on jax's default device."""
        ...


def open_source(directory: Path) -> Source:
    """Raises CheckpointError or ConfigError listing what is wrong with the checkpoint in `directory`."""
    if checkpoint.is_orbax(directory):
        config, params = checkpoint.restore(directory)
        leaves = {leaf.path: leaf for leaf in stored_leaves(config)}
        tree = flatten(params)
        if problems := disagreements(tuple(leaves.values()), tree):
            raise CheckpointError(f"{directory}: parameters and config disagree", problems)
        return _Restored(directory, config, leaves, tree)
    config, stored, files = open_files(directory)
    return _Released(directory, config, {leaf.path: leaf for leaf in stored}, files)


def source_files(source: Source) -> list[tuple[str, int, int]]:
    """(name, bytes, time of last change in ns) of its files: whether it is still the same checkpoint."""
    paths = source.directory.rglob("*") if source.whole else source.directory.glob("*")
    found = ((path, path.stat()) for path in sorted(paths) if path.is_file())
    return [(str(path.relative_to(source.directory)), stat.st_size, stat.st_mtime_ns) for path, stat in found]


@dataclass(frozen=True)
class _Released:
    directory: Path
    config: ModelConfig
    leaves: Mapping[tuple[Any, ...], StoredLeaf]
    files: dict[str, SafetensorsFile]
    whole: bool = False

    def dtype(self, leaf: StoredLeaf) -> str:
        name = leaf.tensors[0].name
        return self.files[name].entries[name].dtype

    def read(self, leaf: StoredLeaf) -> dict[str, np.ndarray]:
        return read_leaf(leaf, self.files)

    def params(self) -> dict[Any, Any]:
        return checkpoint.read(self.directory)[1]


@dataclass(frozen=True)
class _Restored:
    directory: Path
    config: ModelConfig
    leaves: Mapping[tuple[Any, ...], StoredLeaf]
    tree: Mapping[tuple[Any, ...], Any]
    whole: bool = True

    def dtype(self, leaf: StoredLeaf) -> str:
        if leaf.format is not None or leaf.spec.kind == "hash":
            return leaf.tensors[0].dtypes[0]
        return STORED_NAMES[np.dtype(self.tree[leaf.path].dtype)]

    def read(self, leaf: StoredLeaf) -> dict[str, np.ndarray]:
        return {part: np.asarray(part_of(self.tree[leaf.path], part)) for part in leaf.parts}

    def params(self) -> dict[Any, Any]:
        return nest(self.tree.items())

"""A model -> a checkpoint in the released layout that `read` and, where `StorageConfig.released`, others load.

Every leaf is written in the dtype it has; nothing is quantised, cast or repaired on the way. What does not
agree with the config is an error before a byte is written.
"""

from __future__ import annotations

import os
import secrets
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dsv4.checkpoint.agreement import STORED_NAMES, Tree, disagreements, flatten, require_expressible
from dsv4.checkpoint.errors import CheckpointError
from dsv4.checkpoint.layout import StoredLeaf, StoredTensor, stored_leaves
from dsv4.checkpoint.safetensors_write import Source, write_file
from dsv4.checkpoint.shard_plan import index_text, plan_shards
from dsv4.checkpoint.shards import INDEX
from dsv4.checkpoint.transfer import checked
from dsv4.checkpoint.tree import part_of
from dsv4.config.model import ModelConfig
from dsv4.config.released import write_released


class Model(Protocol):
    """What can be written: a config and its parameters. `tokenizer_path`, a file, is copied if given."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def params(self) -> Any: ...


def export(model: Model, directory: str | Path, *, max_shard_bytes: int = 4 << 30) -> None:
    """Writes `model` as a released checkpoint: config.json, safetensors (with index if sharded), tokenizer.

    The checkpoint appears at `directory` whole or not at all: it is written beside it and renamed. A shard
    holds at most `max_shard_bytes`, or one tensor.

    Raises ConfigError for a model the released format cannot express; CheckpointError if `directory` is not
    vacant, listing every parameter that disagrees with the config, naming a weight that is not a finite
    number, or if the files cannot be written. Warns where other implementations will not read the result.
    """
    directory, config = Path(directory), model.config
    require_vacant(directory)
    require_expressible(config)
    leaves, tree = tuple(stored_leaves(config)), flatten(model.params)
    if problems := disagreements(leaves, tree):
        raise CheckpointError(f"cannot export to {directory}: parameters and config disagree", problems)
    warn_of_own_layout(config)
    shards = plan_shards(_sources(leaves, tree), max_shard_bytes)
    tokenizer = getattr(model, "tokenizer_path", None)
    try:
        with replacing(directory) as new:
            new.mkdir()
            write_released(config, new / "config.json")
            if tokenizer is not None:
                shutil.copyfile(tokenizer, new / "tokenizer.json")
            for name, tensors in shards.items():
                write_file(new / name, tensors)
            if len(shards) > 1:
                (new / INDEX).write_text(index_text(shards))
    except OSError as error:
        raise CheckpointError(f"cannot write {directory}, nothing was left there: {error}") from error


def warn_of_own_layout(config: ModelConfig) -> None:
    """Warns of a storage that only dsv4 reads, naming the fields that the released layout has no place for."""
    if found := config.storage.beyond_released:
        warnings.warn(
            f"only dsv4 will read this checkpoint, the released layout has no place for: {'; '.join(found)}",
            stacklevel=3,
        )


def require_vacant(directory: Path) -> None:
    """Raises CheckpointError unless `directory` is an empty directory or does not exist."""
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists():
        what = "exists and is not empty" if directory.is_dir() else "is a file"
        raise CheckpointError(f"{directory} {what}: choose another directory, or remove it first")


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A path to make a directory at; it takes the place of `directory` when the block ends without an error.

    It lies in a hidden sibling of `directory` (the same file system), which is removed in any case.
    """
    directory = directory.absolute()
    workspace = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.partial")
    try:
        workspace.mkdir(parents=True)
        yield workspace / "new"
        os.replace(workspace / "new", directory)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def _sources(leaves: Sequence[StoredLeaf], tree: Tree) -> Iterator[Source]:
    for leaf in leaves:
        value = tree[leaf.path]
        for tensor in leaf.tensors:
            array = part_of(value, tensor.part)
            dtype = stored_dtype(leaf, tensor, array.dtype)
            yield Source(tensor.name, dtype, tensor.shape, partial(_chunks, array, tensor, dtype, leaf.experts))


def stored_dtype(leaf: StoredLeaf, tensor: StoredTensor, dtype: Any) -> str:
    """The safetensors type that one tensor of a leaf is written as; a plain float leaf keeps its own `dtype`."""
    fixed = leaf.format is not None or leaf.spec.kind == "hash"
    return tensor.dtypes[0] if fixed else STORED_NAMES[np.dtype(dtype)]


def _chunks(array: Any, tensor: StoredTensor, dtype: str, experts: int) -> Iterator[np.ndarray]:
    """The stored elements of one tensor, checked as `read` will check them."""
    flat = _on_host(array, tensor.expert).reshape(-1)
    yield from checked(flat, tensor.name, tensor.shape, dtype, experts)


def _on_host(array: Any, expert: int | None) -> np.ndarray:
    if isinstance(array, jax.Array) and any(device.platform != "cpu" for device in array.devices()):
        # jax keeps the host copy of an array alive beside it; that of a fresh slice or copy goes with it.
        array, expert = jnp.copy(array) if expert is None else array[expert], None
    host = np.asarray(array)
    return host if expert is None else host[expert]

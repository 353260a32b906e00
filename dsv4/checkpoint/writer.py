"""A model -> a checkpoint in the released layout that `read` and other implementations load.

Every leaf is written in the dtype it has; nothing is quantised, cast or repaired on the way. What does not
agree with the config is an error before a byte is written.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
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
from dsv4.checkpoint.safetensors import CHUNK, DTYPES, Source, write_file
from dsv4.checkpoint.shards import INDEX
from dsv4.checkpoint.transfer import describe, invalid, out_of_range
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
    number, or if the files cannot be written.
    """
    directory, config = Path(directory), model.config
    require_vacant(directory)
    require_expressible(config)
    leaves, tree = tuple(stored_leaves(config)), flatten(model.params)
    if problems := disagreements(leaves, tree):
        raise CheckpointError(f"cannot export to {directory}: parameters and config disagree", problems)
    shards = _shards(_sources(leaves, tree), max_shard_bytes)
    tokenizer = getattr(model, "tokenizer_path", None)
    try:
        with replacing(directory) as new:
            new.mkdir()
            write_released(config, new / "config.json")
            if tokenizer is not None:
                shutil.copyfile(tokenizer, new / "tokenizer.json")
            _write_shards(shards, new)
    except OSError as error:
        raise CheckpointError(f"cannot write {directory}, nothing was left there: {error}") from error


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


def _shards(tensors: Iterable[Source], limit: int) -> list[list[Source]]:
    """Fills shard after shard, in order."""
    shards: list[list[Source]] = [[]]
    room = limit
    for tensor in tensors:
        if tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards


def _write_shards(shards: Sequence[Sequence[Source]], directory: Path) -> None:
    if len(shards) == 1:
        write_file(directory / "model.safetensors", shards[0])
        return
    mapping = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(directory / name, tensors)
        mapping |= {tensor.name: name for tensor in tensors}
    size = sum(tensor.nbytes for tensors in shards for tensor in tensors)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(mapping.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _sources(leaves: Sequence[StoredLeaf], tree: Tree) -> Iterator[Source]:
    for leaf in leaves:
        value = tree[leaf.path]
        for tensor in leaf.tensors:
            array = getattr(value, tensor.part) if leaf.format else value
            fixed = leaf.format is not None or leaf.spec.kind == "hash"  # else it is the leaf's own
            dtype = tensor.dtypes[0] if fixed else STORED_NAMES[np.dtype(array.dtype)]
            yield Source(tensor.name, dtype, tensor.shape, partial(_chunks, array, tensor, dtype, leaf.experts))


def _chunks(array: Any, tensor: StoredTensor, dtype: str, experts: int) -> Iterator[np.ndarray]:
    """The stored elements of one tensor, checked as `read` will check them."""
    flat = _on_host(array, tensor.expert).reshape(-1)
    step = CHUNK // flat.dtype.itemsize
    for start in range(0, flat.size, step):
        chunk = flat[start : start + step]
        problem = out_of_range(chunk, experts) if dtype == "I64" else invalid(chunk)
        if problem is not None:
            text = f"{tensor.name}{describe(tensor.shape, start, problem)}"
            raise CheckpointError("cannot export", {"values that are no weights": [text]})
        yield chunk.astype(np.int64) if dtype == "I64" else chunk.view(DTYPES[dtype])


def _on_host(array: Any, expert: int | None) -> np.ndarray:
    if isinstance(array, jax.Array) and any(device.platform != "cpu" for device in array.devices()):
        # jax keeps the host copy of an array alive beside it; that of a fresh slice or copy goes with it.
        array, expert = jnp.copy(array) if expert is None else array[expert], None
    host = np.asarray(array)
    return host if expert is None else host[expert]

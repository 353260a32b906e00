"""Writes the safetensors file format: whole files atomically, and the header of a file whose tensors come later."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dsv4.checkpoint.safetensors import DTYPES


@dataclass(frozen=True)
class Planned:
    """A tensor of a file: dtype is its safetensors name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Source(Planned):
    """A tensor to write. `chunks()` gives its elements in order, in any number of arrays of its dtype."""

    chunks: Callable[[], Iterable[np.ndarray]]


def write_file(path: str | Path, tensors: Sequence[Source]) -> None:
    """Writes `tensors` to the file `path`, through a temporary sibling, so that `path` is whole or absent.

    Raises OSError, and ValueError for a tensor whose chunks do not add up to its shape; the temporary file is removed
    then.
    """
    path = Path(path)
    start, places = header(tensors)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(start)
            for tensor in sorted(tensors, key=lambda tensor: places[tensor.name]):
                write_tensor(file, tensor, tensor.chunks())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def header(tensors: Sequence[Planned]) -> tuple[bytes, dict[str, int]]:
    """(what a file with `tensors` begins with, tensor name -> where in the file its data starts).

    Wider types come first, which keeps every tensor aligned.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    cursor = 0
    for tensor in sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize):
        offsets = [cursor, cursor := cursor + tensor.nbytes]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    return start, {tensor.name: len(start) + entries[tensor.name]["data_offsets"][0] for tensor in tensors}


def write_tensor(file: BinaryIO, tensor: Planned, chunks: Iterable[np.ndarray]) -> None:
    """Writes the data of `tensor` at the place where `file` stands. Raises as `write_file`."""
    written = 0
    for chunk in chunks:
        if chunk.dtype != DTYPES[tensor.dtype]:
            raise ValueError(f"{tensor.name}: a chunk of {chunk.dtype} for a tensor of {tensor.dtype}")
        written += file.write(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
    if written != tensor.nbytes:
        raise ValueError(f"{tensor.name}: {written} bytes given, {list(tensor.shape)} takes {tensor.nbytes}")

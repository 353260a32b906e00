"""The safetensors file format: a checked, lazily mapped reader.

A file is an 8-byte little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`, and the
data; offsets count from the end of the header. We read it ourselves because the `safetensors` package cannot
load float8 arrays. A header is hostile until proven otherwise: every length and offset is checked before
anything is touched.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from dsv4.checkpoint.errors import CheckpointError

DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
# Bytes moved at a time. It bounds mapped pages, and temporaries: from 1 MiB on, malloc maps and unmaps each of them,
# which makes checking one-byte types three times slower.
CHUNK = 512 << 10


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `start` and `stop` are byte offsets into the whole file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class SafetensorsFile:
    """A file opened for reading: its header is checked, its data mapped and not yet read.

    Raises CheckpointError listing what is wrong with the header, or OSError. The file must not shrink while
    it is open, as with every mapping.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with open(self.path, "rb") as file:
            self.entries = _read_header(file, self.path)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes = np.frombuffer(self._map, np.uint8)

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """The elements of a tensor in order, as flat read-only views of at most CHUNK bytes.

        A view is good until the next one is asked for; its pages then leave this process, so that reading a
        file does not add the file to the memory in use. Views may be unaligned.
        """
        entry = self.entries[name]
        for start in range(entry.start, entry.stop, CHUNK):
            stop = min(start + CHUNK, entry.stop)
            yield self._bytes[start:stop].view(DTYPES[entry.dtype])
            if hasattr(mmap, "MADV_DONTNEED"):
                page = start - start % mmap.PAGESIZE
                self._map.madvise(mmap.MADV_DONTNEED, page, stop - page)


def _read_header(file: BinaryIO, path: Path) -> dict[str, Entry]:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise _broken(path, f"{size} bytes long, header of {length}: truncated, or no safetensors file")
    if length > MAX_HEADER:
        raise _broken(path, f"header of {length} bytes, at most {MAX_HEADER} are read")
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise _broken(path, f"header is {type(header).__name__}, expected an object")
    header.pop("__metadata__", None)
    entries, problems = {}, []
    for name, raw in header.items():
        entry = _entry(raw, 8 + length)
        if isinstance(entry, str):
            problems.append(f"{name}: {entry}")
        else:
            entries[name] = entry
    problems = problems or _layout_problems(entries, 8 + length, size)
    if problems:
        raise _broken(path, *problems)
    return entries


def _broken(path: Path, *problems: str) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read", {"broken file": problems})


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(n for n in names if names.count(n) > 1)!r} twice")
    return found


def _entry(raw: Any, data_start: int) -> Entry | str:
    """The checked entry, or what is wrong with it."""
    if not isinstance(raw, dict) or raw.keys() != {"dtype", "shape", "data_offsets"}:
        return f"header entry {str(raw)[:80]}, expected dtype, shape and data_offsets"
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"dtype {dtype!r}, supported are {', '.join(DTYPES)}"
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            return f"{str(numbers)[:80]} where a list of integers >= 0 is expected"
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets {offsets}, expected [begin, end]"
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if needed != offsets[1] - offsets[0]:
        return f"{dtype} {shape} takes {needed} bytes, data_offsets {offsets} span {offsets[1] - offsets[0]}"
    return Entry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _layout_problems(entries: dict[str, Entry], data_start: int, size: int) -> list[str]:
    """Tensors must tile the data without overlap, gap or rest, as the reference implementation demands."""
    problems, cursor, last = [], data_start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start < cursor:
            problems.append(f"{name} overlaps {last} by {cursor - entry.start} bytes")
        elif entry.start > cursor:
            problems.append(f"{entry.start - cursor} bytes between {last} and {name} belong to no tensor")
        if entry.stop > cursor:
            cursor, last = entry.stop, name
    if cursor > size:
        problems.append(f"truncated: {size} bytes long, its tensors end at {cursor} ({last} is the last)")
    elif cursor < size:
        problems.append(f"{size - cursor} bytes after the last tensor ({last}) belong to no tensor")
    return problems

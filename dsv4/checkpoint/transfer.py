"""Moves stored elements into (or out of) their place, checking every one on the way.

| stored | in memory | what is refused |
|---|---|---|
| any float | the same | NaN, infinity (E4M3: its NaN codes; E8M0: code 255), in weights and scales alike |
| packed E2M1 (I8 or U8) | uint8 | nothing, every code is a number |
| I64 | int32 | an expert number outside 0 .. experts - 1 |
| F32 | E8M0 | a scale that is no power of two between 2^-127 and 2^127 |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import ml_dtypes
import numpy as np

from dsv4.checkpoint.errors import CheckpointError
from dsv4.checkpoint.safetensors import CHUNK, DTYPES

E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
# dtype -> bits that are all set in a value that is not a finite number, and only there.
_NOT_FINITE = {
    np.dtype(np.float32): np.uint32(0x7F800000),
    np.dtype(ml_dtypes.bfloat16): np.uint16(0x7F80),
    np.dtype(np.float16): np.uint16(0x7C00),
    np.dtype(ml_dtypes.float8_e5m2): np.uint8(0x7C),
    np.dtype(ml_dtypes.float8_e4m3fn): np.uint8(0x7F),
    E8M0: np.uint8(0xFF),
}


def transfer(chunks: Iterable[np.ndarray], destination: np.ndarray, experts: int) -> str | None:
    """Copies flat `chunks` into the contiguous `destination`, of the stored dtype or its partner above.

    Returns what is wrong with the first bad element (`"[3, 5] is nan"`), or None. `experts` bounds hash
    tables.
    """
    flat, filled = destination.reshape(-1), 0
    assert destination.flags.c_contiguous, "reshape would have copied"
    for chunk in chunks:
        part = flat[filled : filled + chunk.size]
        problem = _convert(chunk, part, experts) or invalid(part)
        if problem is not None:
            return describe(destination.shape, filled, problem)
        filled += chunk.size
    return None


def checked(flat: np.ndarray, name: str, shape: tuple[int, ...], dtype: str, experts: int) -> Iterator[np.ndarray]:
    """The elements of `flat` as the tensor `name` of safetensors type `dtype` stores them, chunk by chunk.

    Raises CheckpointError for one that `transfer` would refuse.
    """
    step = CHUNK // flat.dtype.itemsize
    for start in range(0, flat.size, step):
        chunk = flat[start : start + step]
        problem = out_of_range(chunk, experts) if dtype == "I64" else invalid(chunk)
        if problem is not None:
            text = f"{name}{describe(shape, start, problem)}"
            raise CheckpointError("cannot write the checkpoint", {"values that are no weights": [text]})
        yield chunk.astype(np.int64) if dtype == "I64" else chunk.view(DTYPES[dtype])


def describe(shape: tuple[int, ...], offset: int, problem: tuple[int, str]) -> str:
    """`(index into a chunk that starts at flat `offset`, text)` -> the text with the element's indices."""
    at = np.unravel_index(offset + problem[0], shape)
    return f"[{', '.join(map(str, at))}] {problem[1]}"


def invalid(x: np.ndarray) -> tuple[int, str] | None:
    """The first element of the flat `x` that is not a finite number, as (index, text)."""
    mask = _NOT_FINITE.get(x.dtype)
    if mask is None:
        return None
    bad = (x.view(mask.dtype) & mask) == mask
    if not bad.any():
        return None
    first = int(bad.argmax())
    return first, f"is {float(x[first])}"


def out_of_range(table: np.ndarray, experts: int) -> tuple[int, str] | None:
    """The first entry of a flat hash table that is no expert, as (index, text)."""
    bad = (table < 0) | (table >= experts)
    if not bad.any():
        return None
    first = int(bad.argmax())
    return first, f"is expert {table[first]}, the model has 0 to {experts - 1}"


def _convert(source: np.ndarray, destination: np.ndarray, experts: int) -> tuple[int, str] | None:
    if source.dtype == np.int64 and destination.dtype == np.int32:
        if problem := out_of_range(source, experts):
            return problem
        destination[:] = source
        return None
    if source.dtype == np.float32 and destination.dtype == E8M0:
        return _pack_scales(source, destination)
    destination.view(np.uint8)[:] = source.view(np.uint8)
    return None


def _pack_scales(source: np.ndarray, destination: np.ndarray) -> tuple[int, str] | None:
    """Float32 powers of two to E8M0 codes: the exponent field, which is 0 for the subnormal 2^-127."""
    bits = source.view(np.uint32)
    normal = ((bits & 0x807FFFFF) == 0) & (bits != 0) & (bits != 0x7F800000)  # 0 and infinity are no scales
    exact = normal | (bits == 0x00400000)
    if not exact.all():
        first = int(exact.argmin())
        return first, f"is a scale of {source[first]}, only powers of two fit UE8M0"
    destination.view(np.uint8)[:] = bits >> 23
    return None

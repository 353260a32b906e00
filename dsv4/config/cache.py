"""How a cache stores what decoding remembers."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Literal

from dsv4.config.errors import require
from dsv4.config.model import AttentionConfig
from pallas_kernels.row_format import RowFormat, entry_format, index_format

EntryKind = Literal["float32", "bfloat16", "fp8", "fp8_tensor", "int8"]
IndexKind = Literal["float32", "bfloat16", "fp8", "fp4"]


@dataclass(frozen=True)
class CacheFormat:
    """How window entries, compressed entries and index keys are stored; `pallas_kernels.formats` says what each is.

    fp8 entries are the interchange format (`pallas_kernels.quant.pages`), with rotary channels in bfloat16. fp8 and fp4
    index keys are Hadamard-rotated, and the queries that meet them rotated and rounded alike.
    """

    window: EntryKind = "fp8"
    entries: EntryKind = "fp8"
    index: IndexKind = "fp8"

    def __post_init__(self) -> None:
        for name, kinds in (("window", EntryKind), ("entries", EntryKind), ("index", IndexKind)):
            value, known = getattr(self, name), typing.get_args(kinds)
            require(value in known, f"cache.{name} is {value!r}: one of {', '.join(known)}")

    def window_format(self, attention: AttentionConfig) -> RowFormat:
        return entry_format(self.window, attention.rope_dim)

    def entry_format(self, attention: AttentionConfig) -> RowFormat:
        return entry_format(self.entries, attention.rope_dim)

    def index_format(self) -> RowFormat:
        return index_format(self.index)


# By the names command lines use.
CACHE_FORMATS = {
    "float32": CacheFormat("float32", "float32", "float32"),
    "bf16": CacheFormat("bfloat16", "bfloat16", "bfloat16"),
    "fp8": CacheFormat("fp8", "fp8", "fp8"),
    "fp8_fp4_index": CacheFormat("fp8", "fp8", "fp4"),
    "fp8_tensor": CacheFormat("fp8_tensor", "fp8_tensor", "fp8"),
    "int8": CacheFormat("int8", "int8", "fp8"),
}

"""Bytes a sequence takes in the cache: a part that grows with every token, and a part that does not.

The growing part is what the compressed layers append: a CSA layer one entry and one index key every `ratio` tokens, an
HCA layer one entry, a full layer one entry every token. The fixed part is each layer's window and its open blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsv4.config import AttentionConfig, ModelConfig

EntryFormat = Literal["float32", "bfloat16", "fp8"]
IndexFormat = Literal["float32", "bfloat16", "fp8", "fp4"]
PLAIN_BYTES = {"float32": 4, "bfloat16": 2}
ENTRY_TILE = 64  # codes of an fp8 entry that share one scale byte
SCALE_ALIGN = 8  # the scale bytes of an fp8 entry are padded to a multiple of this
FP4_GROUP = 32


@dataclass(frozen=True)
class CacheFormat:
    """How entries and index keys are stored together."""

    name: str
    entry: EntryFormat
    index: IndexFormat


DRAFT_ROWS = 3  # pallas_kernels.ring.MAX_STEP - 1, which this module cannot import: it would load jax

CACHE_FORMATS = (
    CacheFormat("bf16", "bfloat16", "bfloat16"),
    CacheFormat("fp8", "fp8", "fp8"),
    CacheFormat("fp8 + fp4 index", "fp8", "fp4"),
)


def entry_bytes(attention: AttentionConfig, entry: EntryFormat) -> int:
    """One KV entry [K]. fp8: K-R E4M3 codes, R bf16 rotary dims, one scale byte a tile of 64, padded to 8."""
    if entry != "fp8":
        return attention.head_dim * PLAIN_BYTES[entry]
    codes = attention.head_dim - attention.rope_dim
    scales = _round_up(-(-codes // ENTRY_TILE), SCALE_ALIGN)
    return codes + 2 * attention.rope_dim + scales


def index_key_bytes(width: int, index: IndexFormat) -> int:
    """One index key. fp8: E4M3 codes and one float32 scale; fp4: two codes a byte and a scale byte a group of 32."""
    match index:
        case "fp8":
            return width + 4
        case "fp4":
            return -(-width // 2) + -(-width // FP4_GROUP)
        case _:
            return width * PLAIN_BYTES[index]


def bytes_per_token(config: ModelConfig, cache: CacheFormat) -> float:
    """What one more token of context adds to the cache, on average over whole blocks."""
    entry = entry_bytes(config.attention, cache.entry)
    index = index_key_bytes(config.indexer.head_dim, cache.index)
    total = 0.0
    for layer in config.layers:
        match layer.kind:
            case "csa":
                total += (entry + index) / layer.ratio
            case "hca":
                total += entry / layer.ratio
            case "full":
                total += entry
    return total


def window_bytes(config: ModelConfig, cache: CacheFormat) -> int:
    """The windows of one sequence, however long it is: `window` entries in every layer that has one."""
    windows = sum(layer.kind != "full" for layer in config.layers)
    return windows * config.attention.window * entry_bytes(config.attention, cache.entry)


def compressor_state_bytes(config: ModelConfig) -> int:
    """The open blocks of one sequence, float32 keys and gates: `ratio` rows of K; CSA overlaps, two blocks of 2K.

    Each has DRAFT_ROWS rows more, so that rejected drafts can be taken back.
    """

    def open_block(ratio: int, width: int, overlap: bool) -> int:
        blocks = 2 if overlap else 1
        return 2 * 4 * (blocks * ratio + DRAFT_ROWS) * (blocks * width)

    total = 0
    for layer in config.layers:
        if layer.compressed:
            total += open_block(layer.ratio, config.attention.head_dim, layer.kind == "csa")
        if layer.kind == "csa":
            total += open_block(layer.ratio, config.indexer.head_dim, True)
    return total


def dense_multihead_bytes_per_token(config: ModelConfig) -> int:
    """What a plain bf16 multi-head cache would take for the same heads: a key and a value of every head and layer."""
    return len(config.layers) * 2 * config.attention.heads * config.attention.head_dim * 2


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple

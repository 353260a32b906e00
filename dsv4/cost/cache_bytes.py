"""Bytes a sequence takes in the cache: a part that grows with every token, and a part that does not.

The growing part is what the compressed layers append: a CSA layer one entry and one index key every `ratio` tokens, an
HCA layer one entry, a full layer one entry every token. The fixed part is each layer's window and its open blocks.
"""

from __future__ import annotations

from dsv4.config import AttentionConfig, CacheFormat, ModelConfig
from pallas_kernels.row_format import entry_format, index_format

DRAFT_ROWS = 3  # pallas_kernels.ring.MAX_STEP - 1, which this module cannot import: it would load jax


def entry_bytes(attention: AttentionConfig, kind: str) -> int:
    """One KV entry [K] stored as `kind`. fp8: K-R codes, R bf16 rotary dims, a scale byte a tile of 64, padded to 8."""
    return entry_format(kind, attention.rope_dim).nbytes(attention.head_dim)


def index_key_bytes(width: int, kind: str) -> int:
    """One index key. fp8: E4M3 codes and one float32 scale; fp4: two codes a byte and a scale byte a group of 32."""
    return index_format(kind).nbytes(width)


def bytes_per_token(config: ModelConfig, cache: CacheFormat) -> float:
    """What one more token of context adds to the cache, on average over whole blocks."""
    entry = entry_bytes(config.attention, cache.entries)
    index = index_key_bytes(config.indexer.head_dim, cache.index)
    total = 0.0
    for layer in config.layers:
        match layer.kind:
            case "csa":
                total += (entry + index) / layer.ratio
            case "hca":
                total += entry / layer.ratio
            case "full":
                total += entry_bytes(config.attention, cache.window)
    return total


def window_bytes(config: ModelConfig, cache: CacheFormat) -> int:
    """The windows of one sequence, however long it is: `window` entries in every layer that has one."""
    windows = sum(layer.kind != "full" for layer in config.layers)
    return windows * config.attention.window * entry_bytes(config.attention, cache.window)


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

"""The shapes that are scored, named by model and use; benchmarks read them here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScoreCase:
    """`tokens` queries of `heads` heads for each of `batch` sequences of `entries` keys, in pages of `page`.

    keys: how they are stored, and queries alike; pallas_kernels.row_format names it.
    """

    name: str
    batch: int
    tokens: int
    entries: int
    heads: int = 64
    width: int = 128
    page: int = 64
    keys: str = "fp8"


# V4-Flash: 1 M, 256 K and 32 K tokens of context, four of them an entry; with drafts; a prefill of 2048 tokens.
BENCH = (
    ScoreCase("flash scores b=1 c=262144", 1, 1, 262144),
    ScoreCase("flash scores b=32 c=65536", 32, 1, 65536),
    ScoreCase("flash scores b=128 c=8192", 128, 1, 8192),
    ScoreCase("flash scores b=128 t=2 c=8192", 128, 2, 8192),
    ScoreCase("flash scores b=1 t=2048 c=16384", 1, 2048, 16384),
    ScoreCase("flash fp4 scores b=1 c=262144", 1, 1, 262144, keys="fp4"),
    ScoreCase("flash fp4 scores b=32 c=65536", 32, 1, 65536, keys="fp4"),
    ScoreCase("flash fp4 scores b=128 c=8192", 128, 1, 8192, keys="fp4"),
    ScoreCase("flash fp4 scores b=1 t=2048 c=16384", 1, 2048, 16384, keys="fp4"),
    ScoreCase("medium scores b=16 c=4096", 16, 1, 4096, 8, 64),
)

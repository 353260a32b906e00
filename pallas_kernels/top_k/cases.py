"""The shapes of selection, named by model and use; benchmarks read them here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TopKCase:
    """The k best of `entries` scores, for each of `rows` queries."""

    name: str
    rows: int
    entries: int
    k: int = 512


# V4-Flash: 1 M tokens of context, four of them an entry, 256 K, 32 K and 4 K; a prefill; V4-Pro takes 1024; and
# the most that can be taken.
BENCH = (
    TopKCase("flash top 512 b=1 c=262144", 1, 262144),
    TopKCase("flash top 512 b=32 c=262144", 32, 262144),
    TopKCase("flash top 512 b=32 c=65536", 32, 65536),
    TopKCase("flash top 512 b=128 c=8192", 128, 8192),
    TopKCase("flash top 512 b=1 c=1024", 1, 1024),
    TopKCase("flash top 512 t=2048 c=16384", 2048, 16384),
    TopKCase("pro top 1024 b=1 c=262144", 1, 262144, 1024),
    TopKCase("top 2048 b=1 c=262144", 1, 262144, 2048),
    TopKCase("top 2048 b=32 c=262144", 32, 262144, 2048),
)

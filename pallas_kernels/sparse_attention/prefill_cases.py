"""The shapes of prefill attention, named by model and use; tests and benchmarks read them here."""

from __future__ import annotations

from typing import NamedTuple


class PrefillCase(NamedTuple):
    """The last `tokens` queries of one sequence, each over `window` tokens and `top` of `entries` compressed ones.

    top 0: over all entries that it may see, one for `ratio` tokens.
    """

    name: str
    tokens: int
    entries: int
    top: int
    ratio: int = 4
    heads: int = 64
    width: int = 512
    window: int = 128


BENCH = (
    PrefillCase("flash t=2048 128 + 512 of 4096", 2048, 4096, 512),
    PrefillCase("flash t=256 128 + 512 of 4096", 256, 4096, 512),
    PrefillCase("flash t=2048 128 + 512 of 65536", 2048, 65536, 512),
    PrefillCase("flash t=2048 128 + all of 1024", 2048, 1024, 0, ratio=128),
    PrefillCase("flash t=2048 128", 2048, 0, 0),
    PrefillCase("pro t=2048 128 + 1024 of 4096", 2048, 4096, 1024, heads=128),
)

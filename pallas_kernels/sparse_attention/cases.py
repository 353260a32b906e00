"""The shapes of decode attention, named by model and use; tests, tuning and benchmarks read them here."""

from __future__ import annotations

from typing import NamedTuple


class DecodeCase(NamedTuple):
    """`tokens` queries of each of `batch` sequences, each over `window` and `top` entries.

    alike: of what the queries of a sequence select, the share that is the same; 1.0 with the same window, too.
    """

    name: str
    heads: int
    batch: int
    tokens: int
    top: int
    window: int = 128
    alike: float = 0.0


BENCH = (
    *(
        DecodeCase(f"flash b={batch} t={tokens} 128 + 512", 64, batch, tokens, 512)
        for batch, tokens in ((1, 1), (64, 1), (128, 1), (128, 2), (256, 2))
    ),
    DecodeCase("flash b=128 t=2 128 + 512, 90 % alike", 64, 128, 2, 512, alike=0.9),
    *(DecodeCase(f"flash b={batch} t=1 128 + 8192", 64, batch, 1, 8192) for batch in (1, 64)),
    DecodeCase("pro b=128 t=1 128 + 1024", 128, 128, 1, 1024),
)

"""The shapes of hyper-connections, named by model and use; tests and benchmarks read them here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HyperCase:
    """m tokens of four streams [m, 4, width] bfloat16."""

    name: str
    m: int
    width: int


BENCH = tuple(HyperCase(f"flash m={m}", m, 4096) for m in (1, 16, 128, 512, 4096)) + (
    HyperCase("pro m=128", 128, 7168),
    HyperCase("pro m=4096", 4096, 7168),
)

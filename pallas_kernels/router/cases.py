"""The shapes of routing, named by model and use; tests and benchmarks read them here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RouterCase:
    """Scores of m tokens [m, width] bfloat16 by a matrix [experts, width] float32, of which each token takes k."""

    name: str
    m: int
    experts: int = 256
    width: int = 4096
    k: int = 6


BENCH = (
    *(RouterCase(f"flash router m={m}", m) for m in (1, 8, 64, 128, 512, 4096)),
    RouterCase("pro router m=128", 128, 384, 7168),
)

"""The shapes that are quantised, named by model and use; tests, tuning and benchmarks read them here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowsCase:
    """x [m, k] bfloat16 to codes and scales, behind RMSNorm where `normed`."""

    name: str
    m: int
    k: int
    normed: bool


# V4-Flash: the input of attention and experts (4096 wide, normed), and of projections that no norm precedes.
BENCH = tuple(
    RowsCase(f"flash {'norm + ' if normed else ''}quantize m={m}", m, 4096, normed)
    for m in (1, 16, 128, 4096)
    for normed in (False, True)
)

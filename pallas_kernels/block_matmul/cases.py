"""The shapes of the dense matmuls, named by model and use; tests, tuning and benchmarks read them here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MatmulCase:
    """y [m, n] = x [m, k] @ w [n, k].T."""

    name: str
    m: int
    n: int
    k: int


# Dense projections of V4-Flash: name -> (n, k).
FLASH = {
    "wq_a": (1024, 4096),
    "wq_b": (32768, 1024),
    "wkv": (512, 4096),
    "wo_b": (4096, 8192),
    "gate_up": (4096, 4096),
    "down": (4096, 2048),
}
BENCH = tuple(
    MatmulCase(f"flash {name} m={m}", m, n, k) for m in (1, 16, 64, 128, 4096) for name, (n, k) in FLASH.items()
)

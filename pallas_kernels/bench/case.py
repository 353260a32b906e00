"""One line of a benchmark: inputs, who computes on them, and what the hardware allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

# An H100 SXM as its data sheet has it.
BYTES_PER_SECOND = 3.35e12
FLOPS_PER_SECOND = {"fp8": 1979e12, "bf16": 989e12, "int8": 1979e12}


@dataclass(frozen=True)
class Bench:
    """inputs: key -> one input set. ours, xla: implementations by name, each taking an input set.

    reference: the float32 result, for the check. nbytes: each operand once. peer: the name the peer's adapter knows
    this shape by.
    """

    op: str
    name: str
    inputs: Callable[[jax.Array], Any]
    ours: dict[str, Callable[[Any], Any]]
    xla: dict[str, Callable[[Any], Any]]
    reference: Callable[[Any], Any]
    nbytes: int
    flops: int
    unit: str = "fp8"
    peer: tuple[Any, ...] | None = None
    shape: dict[str, int] = field(default_factory=dict)

    @property
    def limit(self) -> float:
        """Microseconds below which no implementation can be: bytes over bandwidth, or FLOPs over the unit's rate."""
        return max(self.nbytes / BYTES_PER_SECOND, self.flops / FLOPS_PER_SECOND[self.unit]) * 1e6


def disagreement(got: Any, want: Any) -> str | None:
    """Why `got` is not `want` by the tolerance of bfloat16 results; None if it is. NaN must be in the same places."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if (np.isnan(got) != np.isnan(want)).any():
        return f"NaN in {int(np.isnan(got).sum())} places, {int(np.isnan(want).sum())} expected"
    good = ~np.isnan(want)
    error, size = np.abs(got - want)[good], np.abs(want[good])
    rms = float(np.sqrt(np.mean(size**2)))
    relative = float(np.sqrt(np.mean(error**2))) / rms
    worst = float((error / (size + rms)).max())
    if relative > 3e-3 or worst > 2.0**-8:
        return f"relative error {relative:.2e} (3e-3 allowed), worst element {worst:.2e} (3.9e-3 allowed)"
    return None

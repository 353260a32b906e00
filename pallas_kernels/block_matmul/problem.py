"""A product as tables of tilings know it, and what a multiprocessor has for it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

BLOCK, WGMMA_ROWS = 128, 64
SHARED_BYTES = 232_448 - 1024  # of a thread block on Hopper, less what barriers and alignment may take
MOST_COLUMNS = 256  # of one wgmma
MOST_SHARES = 8  # thread blocks of a cluster


@dataclass(frozen=True)
class Problem:
    """m rows times `weights` matrices [n, k] that share them, for each of `experts`.

    m counts the real rows of all experts. rows: of a block that belongs to one expert; 0 where rows are not in blocks,
    or, asked of kernel_sm90, where its tile or cluster may decide.
    """

    m: int
    n: int
    k: int
    weights: int = 1
    experts: int = 1
    rows: int = 0

    def __post_init__(self) -> None:
        least = {"rows": 0}
        if bad := {name: size for name, size in vars(self).items() if size < least.get(name, 1)}:
            raise ValueError(f"sizes {bad}: at least 1 each, rows 0")

    def __str__(self) -> str:
        plain = {"weights": 1, "experts": 1, "rows": 0}
        return " ".join(f"{name}={size}" for name, size in vars(self).items() if size != plain.get(name))

    @classmethod
    def parse(cls, text: str) -> Problem:
        """The problem that `text` is the str of. Raises ValueError."""
        sizes = dict(part.split("=") for part in text.split())
        if unknown := sizes.keys() - {field.name for field in dataclasses.fields(cls)}:
            raise ValueError(f"unknown sizes {', '.join(sorted(unknown))}")
        if missing := {"m", "n", "k"} - sizes.keys():
            raise ValueError(f"{', '.join(sorted(missing))} missing")
        return cls(**{name: int(size) for name, size in sizes.items()})

"""How the Hopper kernel cuts scores up. Nothing here imports Pallas."""

from __future__ import annotations

from dataclasses import dataclass

CONSUMERS = 2
SHARED_MEMORY = 227 * 1024 - 2048  # bytes, less barriers
ITEM = 128  # keys that a step of a thread block scores
MOST_STAGES = 4  # on an H100 262144 keys take 16.0 us with 3, 15.7 with 4, 16.2 with 5, 17.2 with 12


@dataclass(frozen=True)
class ScoreTiling:
    """tokens: queries of one sequence that share a read of its keys. stages: buffers of ITEM keys.

    teams: of CONSUMERS warpgroups, which take turns at items; they divide the stages.
    """

    tokens: int = 1
    stages: int = MOST_STAGES
    teams: int = 1


def default_tiling(tokens: int, heads: int, width: int) -> ScoreTiling:
    """All of a few tokens, or 4, 2 or 1 at a time of many; and as many buffers as fit, up to MOST_STAGES."""
    each = tokens if tokens <= 4 else next(size for size in (4, 2, 1) if tokens % size == 0)
    left = SHARED_MEMORY - 2 * each * heads * width
    return ScoreTiling(each, min(MOST_STAGES, left // (ITEM * (width + 4))))

"""How the Hopper kernel cuts scores up. Nothing here imports Pallas."""

from __future__ import annotations

from dataclasses import dataclass

CONSUMERS = 2
SHARED_MEMORY = 227 * 1024 - 2048  # bytes, less barriers
ITEM = 128  # keys that a step of a thread block scores
MOST_STAGES = 4  # on an H100 262144 keys take 16.0 us with 3, 15.7 with 4, 16.2 with 5, 17.2 with 12


FP4_STAGES = 8
UNPACKED = 64  # rows of FP4 queries that a warpgroup unpacks at once


@dataclass(frozen=True)
class ScoreTiling:
    """tokens: queries of one sequence that share a read of its keys. stages: buffers of ITEM keys.

    teams: of CONSUMERS warpgroups, which take turns at items; they divide the stages.
    """

    tokens: int = 1
    stages: int = MOST_STAGES
    teams: int = 1


def default_tiling(tokens: int, heads: int, width: int, fp4: bool = False) -> ScoreTiling:
    """All of a few tokens, or 4, 2 or 1 at a time of many; and as many buffers as fit, up to the most.

    FP4 keys are work for two teams, for which one token leaves registers.
    """
    each = tokens if tokens <= 4 else next(size for size in (4, 2, 1) if tokens % size == 0)
    rows = each * heads
    if fp4:
        rows = -(-rows // UNPACKED) * UNPACKED
        stages, left = FP4_STAGES, SHARED_MEMORY - 2 * rows * (width + 4 * (width // 32 + 1))
    else:
        stages, left = MOST_STAGES, SHARED_MEMORY - 2 * rows * width
    teams = 2 if fp4 and each == 1 else 1
    fitting = min(stages, left // (ITEM * (width // (2 if fp4 else 1) + 4)))
    return ScoreTiling(each, fitting - fitting % teams, teams)

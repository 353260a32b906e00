"""Into how many thread blocks the Hopper kernel divides the entries of a query."""

from __future__ import annotations

# Estimates, in microseconds: what a thread block takes for 64 entries and beside them, what combining takes, and for
# each part of 64 heads and 512 channels in float32, which is written and read again.
BLOCK, BLOCKS_APART, COMBINE, PART = 2.0, 5.0, 3.0, 0.08
MOST = 64


def splits(units: int, blocks: int, sms: int) -> int:
    """Parts for each of `units` pairs of a query and 64 heads, which have at most `blocks` blocks of 64 entries."""

    def microseconds(parts: int) -> float:
        rounds = -(-units * parts // sms)
        combining = COMBINE + PART * units * parts if parts > 1 else 0.0
        return rounds * (BLOCKS_APART + BLOCK * -(-blocks // parts)) + combining

    return min(range(1, min(blocks, MOST) + 1), key=microseconds)

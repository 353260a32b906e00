"""Among how many thread blocks the Hopper kernels divide the entries and the channels of a query."""

from __future__ import annotations

from typing import NamedTuple

# Microseconds on an H200, to within a tenth or so: what a thread block takes for 64 entries, to add their channels, to
# store its own, and beside that; what combining takes, and for a part of 64 heads and 512 channels, written and read.
BLOCK, ADD, STORE, APART, COMBINE, PART = 2.2, 0.3, 3.0, 2.5, 1.7, 0.04
MOST = 66  # parts that combining has in registers
MANY = 4  # blocks of a query, from which on the kernel for many is faster for several of them
LEAST_SLICE = 128  # channels: a tile of 64 for both warpgroups


class Division(NamedTuple):
    """parts: of a query's entries. slices: of the output's channels, whose thread blocks score all entries each."""

    parts: int = 1
    slices: int = 1


def divide(units: int, blocks: int, width: int, sms: int) -> Division:
    """Of each of `units`, a query and 64 heads, with at most `blocks` blocks of 64 entries of `width` channels."""

    def microseconds(division: Division) -> float:
        parts, slices = division
        rounds = -(-units * parts * slices // sms)
        alone = APART + STORE / slices + (BLOCK + ADD / slices) * -(-blocks // parts)
        combining = COMBINE + PART * units * parts if parts > 1 else 0.0
        return rounds * alone + combining

    possible = [Division(parts) for parts in range(1, min(blocks, MOST) + 1)]
    possible += [
        Division(parts, slices)
        for parts, _ in possible[1:]
        for slices in (2, 4)
        if width % (slices * LEAST_SLICE) == 0 and units * parts * slices <= sms
    ]
    return min(possible, key=microseconds)


def takes_many(units: int, blocks: int, sms: int) -> bool:
    """Whether the kernel for many takes units that are not divided: its thread blocks' next units begin early."""
    return units > sms and blocks >= MANY

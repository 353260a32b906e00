"""How the Hopper kernel spreads the router's matrix over thread blocks. Nothing here imports Pallas."""

from __future__ import annotations

TILE = 64  # experts of a wgmma
CHUNK = 128  # columns that are multiplied at a time
LANES = 128  # what rows and experts are padded to as vectors of a warpgroup
MOST_TOKENS = 128
MOST_CHOSEN = 8
MOST_EXPERTS = 512
MOST_CHUNKS = 4  # of a thread block, whose tokens' columns have to fit in shared memory


def chunks_each(experts: int, columns: int, blocks: int) -> int | None:
    """Chunks of 64 experts that a thread block multiplies: as few as take no more than `blocks`. None: too many.

    Blocks wait for one another: there may be no more than run at once, one a multiprocessor.
    """
    chunks, tiles = columns // CHUNK, experts // TILE
    fitting = (c for c in range(1, MOST_CHUNKS + 1) if chunks % c == 0 and tiles * chunks // c <= blocks)
    return next(fitting, None)


def padded_experts(count: int) -> int:
    """How many experts the kernel works on: those that no router has are never chosen."""
    return -(-count // LANES) * LANES

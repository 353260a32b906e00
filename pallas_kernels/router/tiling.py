"""How the Hopper kernel spreads the router's matrix over thread blocks. Nothing here imports Pallas."""

from __future__ import annotations

from dataclasses import dataclass, replace

LANES = 128  # what experts are padded to: a vector of a warpgroup
STEP = 64  # columns that a warpgroup multiplies at a time
MOST_TOKENS = 128
MOST_CHOSEN = 8
MOST_EXPERTS = 512
TILES = (16, 32, 48, 64)  # experts of a thread block
FEW_TOKENS = 16  # that mma.sync multiplies; wgmma more, which has tiles of 64 experts
_BYTES = 200_000  # of shared memory, for what is multiplied at a time


@dataclass(frozen=True)
class Share:
    """What a thread block multiplies: `experts` rows of the matrix, and of their columns one of `parts` equal parts,
    in `chunks` turns. many: by wgmma."""

    experts: int
    parts: int
    chunks: int
    many: bool = False


def share(tokens: int, experts: int, columns: int, blocks: int) -> Share:
    """The share of most thread blocks, no more than `blocks`, and of those the one that moves the fewest words.

    Blocks wait for one another: there may be no more than run at once, one a multiprocessor.
    """
    found = [
        Share(tile, parts, _chunks(tokens, tile, columns // parts))
        for tile in TILES
        if experts % tile == 0
        for parts in range(1, columns // STEP + 1)
        if columns % (STEP * parts) == 0 and experts // tile * parts <= blocks
    ]
    if tokens > FEW_TOKENS:
        found = [replace(cut, chunks=1, many=True) for cut in found if cut.experts == 64]

    def cost(cut: Share) -> tuple[int, int]:
        # Words that a block reads of tokens, hands over, and reads of what others hand over.
        words = tokens * columns // cut.parts // 2 + tokens * cut.experts + cut.parts * experts
        return -(experts // cut.experts * cut.parts), words

    return min(found, key=cost)


def _chunks(tokens: int, tile: int, columns: int) -> int:
    steps, of_step = columns // STEP, STEP * (4 * tile + 2 * (tokens + 7))
    return next(n for n in range(1, steps + 1) if steps % n == 0 and steps // n * of_step <= _BYTES)


def padded_experts(count: int) -> int:
    """How many experts the kernel works on: those that no router has are never chosen."""
    return -(-count // LANES) * LANES

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


def share(tokens: int, experts: int, columns: int, blocks: int) -> Share | None:
    """The share of most thread blocks, no more than `blocks`, and of those the one that moves the fewest words.

    Blocks wait for one another: there may be no more than run at once, one a multiprocessor. None: it cannot be cut.
    """
    found = [
        (-(experts // tile * parts), _words(tokens, tile, experts, columns, parts), Share(tile, parts, chunks))
        for tile in TILES
        if experts % tile == 0
        for parts in range(1, columns // STEP + 1)
        if columns % (STEP * parts) == 0 and experts // tile * parts <= blocks
        for chunks in [_chunks(tokens, tile, columns // parts)]
    ]
    if tokens > FEW_TOKENS:
        of_many = [(*order, replace(cut, chunks=1, many=True)) for *order, cut in found if cut.experts == 64]
        found = of_many or found
    return min(found, key=lambda x: x[:2])[2] if found else None


def _words(tokens: int, tile: int, experts: int, columns: int, parts: int) -> int:
    """That a thread block reads of tokens, and hands over, and reads of what others hand over."""
    return tokens * columns // parts // 2 + tokens * tile + parts * experts


def _chunks(tokens: int, tile: int, columns: int) -> int:
    steps, of_step = columns // STEP, STEP * (4 * tile + 2 * (tokens + 7))
    return next(n for n in range(1, steps + 1) if steps % n == 0 and steps // n * of_step <= _BYTES)


def padded_experts(count: int) -> int:
    """How many experts the kernel works on: those that no router has are never chosen."""
    return -(-count // LANES) * LANES

"""How the Hopper kernels spread the router's matrix and tokens over thread blocks. Nothing here imports Pallas."""

from __future__ import annotations

from dataclasses import dataclass

LANES = 128  # what experts are padded to: a vector of a warpgroup
STEP = 64  # columns that a warpgroup multiplies at a time
FEW = 128  # tokens, up to which one launch does it all
MOST_CHOSEN = 8
MOST_EXPERTS = 512
TILES = (16, 32, 48, 64)  # experts of a thread block
ROUND = 16  # tokens of a thread block at a time, where there are many
MOST_TILES = 132
_BYTES = 215_000  # of shared memory, for what is multiplied at a time


@dataclass(frozen=True)
class Share:
    """What a thread block multiplies: `experts` rows of the matrix, and of their columns one of `parts` equal parts,
    in `chunks` turns."""

    experts: int
    parts: int
    chunks: int


def share(tokens: int, experts: int, columns: int, blocks: int) -> Share:
    """The share of most thread blocks, no more than `blocks`, and of those the one of fewest parts.

    Blocks wait for one another: there may be no more than run at once, one a multiprocessor. (64 tokens, 256 experts
    on an H200: 7.2 us with 16 experts and 8 parts, 8.2 with 32 and 16.)
    """
    found = [
        Share(tile, parts, _chunks(tokens, tile, columns // parts))
        for tile in TILES
        if experts % tile == 0
        for parts in range(1, columns // STEP + 1)
        if columns % (STEP * parts) == 0 and experts // tile * parts <= blocks
    ]
    return min(found, key=lambda cut: (-(experts // cut.experts * cut.parts), cut.parts))


def _chunks(tokens: int, tile: int, columns: int) -> int:
    steps, of_step = columns // STEP, STEP * (4 * tile + 2 * (tokens + 7))
    return next(n for n in range(1, steps + 1) if steps % n == 0 and steps // n * of_step <= _BYTES)


@dataclass(frozen=True)
class Tiles:
    """How the kernels for many tokens share them out: `count` thread blocks, in `rounds` of 16 tokens each."""

    count: int
    rounds: int

    @property
    def tokens(self) -> int:
        return self.rounds * ROUND


def tiles(tokens: int) -> Tiles:
    """As many as there are multiprocessors at most: each looks at the counts of all."""
    rounds = -(-tokens // (ROUND * MOST_TILES))
    return Tiles(-(-tokens // (ROUND * rounds)), rounds)


def padded_experts(count: int) -> int:
    """How many experts the kernel works on: those that no router has are never chosen."""
    return -(-count // LANES) * LANES

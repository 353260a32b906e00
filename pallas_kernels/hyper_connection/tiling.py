"""How the Hopper kernels of `pre` cut tokens and the flattened streams up, without Pallas."""

from __future__ import annotations

from dataclasses import dataclass

STREAMS = 4
MIXED = (2 + STREAMS) * STREAMS
CHUNK = 128  # columns of a row that `post` holds side by side
UNIT = 128  # columns of the flattened streams whose products are one sum of wgmmas
GROUP = 4  # neighbouring units that are added first, in pairs; then the sums of groups are
TILE = 64  # tokens of a wgmma
TMA_ROWS = 8  # that a copy takes at a time: others have to be padded, which is a copy of the streams
FEW = 128  # tokens up to which a thread block has one tile, and as few columns as there are multiprocessors for
FINISHERS = 2  # warpgroups of a thread block that finish a token together, half of its columns each
LEAST_EPS = 1e-9  # beside Sinkhorn's sums: the product of two must be a normal number
WIDTH_UNIT = 256  # columns of a stream come in multiples of it: a column for every thread of the finishers
MOST_WIDTH = 8192  # of a token, whose streams are 256 rows of 128, as many as TMA copies at once
TWO_HELD = 4096  # up to which a thread block holds two tokens' streams beside two buffers


@dataclass(frozen=True)
class PreTiling:
    """units: that a thread block multiplies for each of its tiles, 1, 2 or GROUP. stages: buffers of a unit of 64
    tokens. lag: tiles that it may load ahead of those it has finished; their streams stay in the L2 cache. held: tokens
    whose streams are in shared memory to be finished. teller: whether a warpgroup of its own tells of partials.

    No bit of the result depends on it: units are added in one order, whoever does it.
    """

    units: int
    stages: int = 4
    lag: int = 4
    held: int = 1
    teller: bool = False

    def __post_init__(self) -> None:
        if self.units not in (1, 2, GROUP):
            raise ValueError(f"{self}: units are 1, 2 or {GROUP}")


def by_words(tokens: int, tiling: PreTiling) -> bool:
    """Whether partials are handed over as words, for which a launch clears memory: up to 1 MB by default tilings."""
    return tokens <= FEW and not tiling.teller


def default_tiling(tokens: int, width: int, multiprocessors: int) -> PreTiling:
    """Few tokens are spread over the device as finely as thread blocks that wait for one another can be.

    Many: what is under way has to stay in the L2 cache. Of an H200's 4096 tokens of 4 x 4096, two stages and a lag of
    four take 74.4 us, of three 74.2, of five 75.5; three stages 78.5, without a teller 82.8, and 77.7 with four; two
    units a thread block, whose partials are twice as many, took 92 to 103. Of 4 x 7168, three stages and one token held
    take 134, two and two 143.
    """
    for units in (1, 2, GROUP):
        if tokens <= FEW and STREAMS * width // (units * UNIT) * -(-tokens // TILE) <= multiprocessors:
            return PreTiling(units, stages=units, lag=5)
    if width <= TWO_HELD:
        return PreTiling(GROUP, stages=2, held=2, teller=True)
    return PreTiling(GROUP, stages=3, teller=True)

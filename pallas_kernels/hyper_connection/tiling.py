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
MOST_WIDTH = 8192  # of a token, half of whose streams take a finisher's thread 64 registers
TWO_AHEAD = 4096  # up to which finishers hold two tokens' streams


@dataclass(frozen=True)
class PreTiling:
    """units: that a thread block multiplies for each of its tiles, 1, 2 or GROUP. stages: buffers of a unit of 64
    tokens. lag: tiles that it may load ahead of those it has finished; their streams stay in the L2 cache.

    No bit of the result depends on it: units are added in one order, whoever does it.
    """

    units: int
    stages: int = 6
    lag: int = 5

    def __post_init__(self) -> None:
        if self.units not in (1, 2, GROUP):
            raise ValueError(f"{self}: units are 1, 2 or {GROUP}")


def default_tiling(tokens: int, width: int, multiprocessors: int) -> PreTiling:
    """Few tokens are spread over the device as finely as thread blocks that wait for one another can be."""
    for units in (1, 2, GROUP):
        if tokens <= FEW and STREAMS * width // (units * UNIT) * -(-tokens // TILE) <= multiprocessors:
            return PreTiling(units, stages=units)
    return PreTiling(GROUP)

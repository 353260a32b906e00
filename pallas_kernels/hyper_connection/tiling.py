"""How the Hopper kernels of `pre` cut tokens and the flattened streams up, without Pallas."""

from __future__ import annotations

from dataclasses import dataclass

STREAMS = 4
MIXED = (2 + STREAMS) * STREAMS
CHUNK = 128  # columns of a row of the streams as finishers see it
UNIT = 256  # columns of the flattened streams whose products are one sum of wgmmas
GROUP = 2  # neighbouring units that are added first; then the sums of groups are
TILE = 64  # tokens of a wgmma
TMA_ROWS = 8  # that a copy takes at a time: others have to be padded, which is a copy of the streams
FEW = 128  # tokens up to which a thread block has a unit, not a group
MOST_WIDTH = 8192  # of a token, which one warpgroup holds: 128 registers of streams
TWO_FINISH = 4096  # widest tokens of which two warpgroups hold one each


@dataclass(frozen=True)
class PreTiling:
    """units: that a thread block multiplies for each of its tiles, 1 or GROUP. stages: buffers of a unit of 64 tokens.
    lag: tiles that a thread block loads ahead of those it has finished; their streams stay in the L2 cache.

    No bit of the result depends on it: units are added in one order, whoever does it.
    """

    units: int
    stages: int = 3
    lag: int = 4

    def __post_init__(self) -> None:
        if self.units not in (1, GROUP):
            raise ValueError(f"{self}: units are 1 or {GROUP}")


def default_tiling(tokens: int) -> PreTiling:
    """Few tokens are spread over the device unit by unit."""
    return PreTiling(1, lag=6) if tokens <= FEW else PreTiling(GROUP)

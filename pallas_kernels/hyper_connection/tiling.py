"""How the Hopper kernels of `pre` cut tokens and the flattened streams up, without Pallas."""

from __future__ import annotations

from dataclasses import dataclass

import jax

STREAMS = 4
MIXED = (2 + STREAMS) * STREAMS
CHUNK = 128  # columns of the flattened streams that are multiplied at a time
GROUP = 8  # neighbouring chunks that are added first; then the sums of groups are
TILE = 64  # tokens of a wgmma
BLOCKS = 128  # that the projection spreads over at most, one a multiprocessor
# Tokens, one a warp. From jax 0.12 on, layout inference finds none for the transposed numbers of several (it searches
# for hours): one there, of the same bits.
MOST_HELD = 4 if jax.__version_info__ < (0, 12) else 1
TMA_ROWS = 8  # that a copy takes at a time: others have to be padded, which is a copy of the streams
FEW = 128  # tokens up to which partial products of every chunk cost less than idle multiprocessors
MOST_WIDTH = 8192  # of a token, which one warpgroup holds: 128 registers of streams


@dataclass(frozen=True)
class PreTiling:
    """chunks: that a thread block multiplies for each of its tiles, 1 or GROUP. stages: buffers of a
    chunk of 64 tokens. held: tokens whose coefficients a warpgroup makes at once, 1, 2 or 4.

    No bit of the result depends on it: chunks are added in one order, whoever does it.
    """

    chunks: int
    stages: int = 4
    held: int = 1

    def __post_init__(self) -> None:
        if self.chunks not in (1, GROUP) or self.held not in (1, 2, 4):
            raise ValueError(f"{self}: chunks are 1 or {GROUP}, and held is 1, 2 or 4")


def default_tiling(tokens: int) -> PreTiling:
    """Few tokens are spread over the device chunk by chunk. Holding 4 of 4096 at once takes 121 us, 1 137."""
    if tokens <= FEW:
        return PreTiling(1)
    return PreTiling(GROUP, held=MOST_HELD if tokens % MOST_HELD == 0 else 1)

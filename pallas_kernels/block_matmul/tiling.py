"""How the matmul kernels cut a problem up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ManyRows:
    """Of kernel_sm90: an output tile and how the two consumers split it, buffers, and the order of tiles.

    Consecutive tiles run along rows of `width` tiles (`rows_first`) or columns, so that their operands meet in the L2.
    """

    tile_m: int = 128
    tile_n: int = 256
    stages: int = 4
    split: Literal["rows", "columns"] = "columns"
    rows_first: bool = True
    width: int = 8


@dataclass(frozen=True)
class FewRows:
    """Of decode_sm90: K blocks a stage, buffers, and consumers of 64 weight rows each."""

    blocks: int = 4
    stages: int = 5
    warpgroups: int = 1
    registers: int = 160

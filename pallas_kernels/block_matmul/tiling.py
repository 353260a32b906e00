"""How the matmul kernels cut a problem up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PRODUCER_REGISTERS = 40
LAUNCH_REGISTERS = 65536 // 128  # of a multiprocessor, for one thread of every warpgroup


def launch_registers(warpgroups: int) -> int:
    """What a thread block of so many warpgroups is given at its launch, for one thread of each; multiples of 8 each.

    Consumers take from the producer, never more: a warpgroup that asks for registers beyond these waits for ever.
    """
    return warpgroups * (LAUNCH_REGISTERS // warpgroups // 8 * 8)


@dataclass(frozen=True)
class ManyRows:
    """Of kernel_sm90: an output tile and how the two consumers split it, buffers, and the order of tiles.

    Consecutive tiles run along rows of `width` tiles (`rows_first`) or columns, so that their operands meet in the L2.
    blocks: of K an iteration takes; in_flight: products it issues before it adds the first, which must divide all that
    it makes. cluster: thread blocks that are neighbours along rows and share the weights' tile, or along columns and
    share the input's. in_turn: the consumers issue alternately. shares: thread blocks, a cluster too, that split
    K of a tile.
    """

    tile_m: int = 128
    tile_n: int = 256
    stages: int = 4
    split: Literal["rows", "columns"] = "columns"
    rows_first: bool = True
    width: int = 8
    blocks: int = 1
    in_flight: int = 1
    cluster: int = 1
    cluster_along: Literal["rows", "columns"] = "rows"
    in_turn: bool = False
    shares: int = 1

    @property
    def rows(self) -> int:
        """That read the same tile of the weights: where they are grouped, of one expert."""
        return self.tile_m * (self.cluster if self.cluster_along == "rows" else 1)


@dataclass(frozen=True)
class FewRows:
    """Of decode_sm90: K blocks a stage, buffers, and consumers of 64 weight rows each.

    shares: thread blocks, a cluster, that share out K of one tile.
    """

    blocks: int = 4
    stages: int = 5
    warpgroups: int = 1
    registers: int = 160
    shares: int = 1

    def __post_init__(self) -> None:
        asked = self.warpgroups * self.registers + PRODUCER_REGISTERS
        if asked > (there := launch_registers(self.warpgroups + 1)):
            raise ValueError(f"{self} asks for {asked} registers (one thread of each warpgroup), there are {there}")

"""The warpgroups of a thread block as one: who one of them is, and when all have come so far.

The interpreter knows neither atomics nor the thread block's own barrier. There one warpgroup after another does what
is atomic on the device, and a barrier of Pallas is in the other's place.
"""

# Pallas decorators turn functions into values, and Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils

from pallas_kernels.mosaic.interpreter import is_interpreted

LANES = 128


class Team(NamedTuple):
    """member: the number of this warpgroup among the `size` that the thread block has. barrier: the interpreter's."""

    member: jax.Array
    size: int
    barrier: Any

    def sync(self) -> None:
        """What any of them has stored in shared memory is there for all, and what they load has been read."""
        if is_interpreted():
            plgpu.barrier_arrive(self.barrier)
            plgpu.barrier_wait(self.barrier)
        else:
            plgpu.inline_mgpu()(lambda _ctx: barrier())()

    def in_turn(self, atomic: Callable[[], None]) -> None:
        """For the interpreter: one warpgroup after another."""
        for member in range(self.size):
            pl.when(self.member == member)(atomic)
            self.sync()


def barrier() -> None:
    utils.inline_ptx("bar.sync 0;", has_side_effects=True, convergent=True)


def scratch(size: int) -> dict[str, Any]:
    return {"barrier": plgpu.Barrier(num_arrivals=size)} if is_interpreted() else {}

"""K shared out among the thread blocks of a cluster: each sums its share, and the shares are added in their order.

Where there are few output tiles, this gives every multiprocessor something to read. A warpgroup puts the parts of its
sums where the others can read them; they meet at a barrier; who finishes a part reads it of all of them, and adds share
by share. The order is fixed, and so are the bits. What they read is each other's shared memory; in the interpreter,
which has no such loads, device memory. (On an H100, device memory was slower throughout, and so were Pallas's stores
into another thread block's memory, by a factor: each carries a fence of the whole device.)
"""

# Pallas's types cannot be followed.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAbstractUsage=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import exchange
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.launch import sm_count

AXIS = "share"  # of the cluster: which part of K a thread block has
_SMALLEST_GPC = 16  # multiprocessors a cluster comes from


def clusters(count: int, tiles: int) -> int:
    """How many clusters of `count` thread blocks to launch for so many tiles: no more than run at once."""
    groups = sm_count() // _SMALLEST_GPC
    most = groups * (_SMALLEST_GPC // count) if count > 2 else sm_count() // count
    return max(1, min(most, tiles))


@dataclass(frozen=True)
class Shares:
    """`parts` float32 arrays [rows, columns] that each of `warpgroups` gets from each of `count` thread blocks.

    clusters: of the launch, on its axis "sm". each: neighbours of which only the first takes part, and is counted. With
    a count of 1 nothing is shared, and every dict and tuple is empty.
    """

    count: int
    parts: int
    rows: int
    columns: int
    warpgroups: int
    clusters: int
    each: int = 1

    @property
    def warpgroup(self) -> Any:
        """Which one this is."""
        return lax.div(lax.axis_index("warpgroup"), self.each)

    def launch(self) -> dict[str, Any]:
        return {"cluster": (self.count,), "cluster_names": (AXIS,)} if self.count > 1 else {}

    def scratch(self) -> dict[str, Any]:
        if self.count == 1:
            return {}
        met = {"met": plgpu.ClusterBarrier(collective_axes=(AXIS,), num_barriers=self.warpgroups)}
        return met if is_interpreted() else met | {"shares": plgpu.SMEM(self._of_thread_block(), jnp.float32)}

    def outputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Device memory for the interpreter, by cluster and thread block."""
        if self.count == 1 or not is_interpreted():
            return ()
        return (jax.ShapeDtypeStruct((self.clusters, self.count, *self._of_thread_block()), jnp.float32),)

    def _of_thread_block(self) -> tuple[int, ...]:
        """By warpgroup, finisher and part."""
        return self.warpgroups, self.count, self.parts, self.rows, self.columns

    def add_up(
        self, parts: Sequence[jax.Array], outputs: Sequence[Any], scratch: dict[str, Any], then: Callable[..., None]
    ) -> None:
        """Calls `then` with the sums over all shares of a tile's parts, in the thread block that finishes them."""
        if self.count == 1:
            then(list(parts))
            return
        finisher = lax.rem(self.warpgroup, self.count)
        self.send(parts, finisher, outputs, scratch)
        self.sent(scratch)
        pl.when(lax.axis_index(AXIS) == finisher)(lambda: then(self.receive(outputs, scratch)))
        self.take(scratch)

    def send(self, parts: Sequence[jax.Array], to: Any, outputs: Sequence[Any], scratch: dict[str, Any]) -> None:
        """Puts a warpgroup's parts where thread block `to`, which finishes them, will read them."""
        if is_interpreted():
            own = outputs[0].at[lax.axis_index("sm"), lax.axis_index(AXIS)]
        else:
            own = scratch["shares"]
        for at, part in enumerate(parts):
            ref = own.at[self.warpgroup, to, at]
            if is_interpreted():
                ref[...] = part
            else:
                exchange.store(ref, part)

    def sent(self, scratch: dict[str, Any]) -> None:
        """Every warpgroup calls it behind its last `send` of a tile."""
        if not is_interpreted():
            exchange.publish()
        self._meet(scratch)
        if not is_interpreted():
            exchange.see()

    def receive(self, outputs: Sequence[Any], scratch: dict[str, Any]) -> list[jax.Array]:
        """The sums over all shares of the parts that were sent here."""
        return [self._sum(at, outputs, scratch) for at in range(self.parts)]

    def _sum(self, part: int, outputs: Sequence[Any], scratch: dict[str, Any]) -> jax.Array:
        at = self.warpgroup, lax.axis_index(AXIS), part
        total = None
        for share in range(self.count):
            if is_interpreted():
                ref = outputs[0].at[lax.axis_index("sm"), share, *at]
                found = plgpu.load(ref, layout=exchange.LAYOUT, optimized=False)
            else:
                found = exchange.load(share, scratch["shares"].at[at])
            total = found if total is None else total + found
        assert total is not None
        return total

    def take(self, scratch: dict[str, Any]) -> None:
        """Every warpgroup calls it at the end of a tile: what was sent may then be written over."""
        plgpu.commit_smem()  # all of the warpgroup has read
        self._meet(scratch)

    def _meet(self, scratch: dict[str, Any]) -> None:
        barrier = scratch["met"].at[self.warpgroup]
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)

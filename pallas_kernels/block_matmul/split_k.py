"""K shared out among the thread blocks of a cluster: each sums its share, and the shares are added in their order.

Where there are few output tiles, this gives every multiprocessor something to read. A warpgroup stores the parts of its
sums into the shared memory of the thread block that finishes them, its own included; a barrier there counts the bytes.
The finisher adds what came, share by share: the order is fixed, and so are the bits.

The interpreter has no stores into another thread block's memory: there the parts go through device memory.
"""

# Pallas's types cannot be followed.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAbstractUsage=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

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

    clusters: of the launch, on its axis "sm". With a count of 1 nothing is shared, and every dict and tuple is empty.
    """

    count: int
    parts: int
    rows: int
    columns: int
    warpgroups: int
    clusters: int

    def launch(self) -> dict[str, Any]:
        return {"cluster": (self.count,), "cluster_names": (AXIS,)} if self.count > 1 else {}

    def scratch(self) -> dict[str, Any]:
        if self.count == 1:
            return {}
        taken = plgpu.ClusterBarrier(collective_axes=(AXIS,), num_barriers=self.warpgroups)
        if is_interpreted():
            return {"taken": taken, "sent": taken}
        width = min(128, 4 * self.columns)  # bytes of a row of the swizzle
        return {
            "taken": taken,
            "came": plgpu.Barrier(num_arrivals=self.count * self.parts, num_barriers=self.warpgroups),
            "shares": plgpu.SMEM(
                (self.warpgroups, *self._shape()),
                jnp.float32,
                transforms=(plgpu.TilingTransform((8, width // 4)), plgpu.SwizzleTransform(width)),
            ),
        }

    def outputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Device memory for the interpreter, by cluster, finisher and warpgroup."""
        if self.count == 1 or not is_interpreted():
            return ()
        shape = self.clusters, self.count, self.warpgroups, *self._shape()
        return (jax.ShapeDtypeStruct(shape, jnp.float32),)

    def _shape(self) -> tuple[int, ...]:
        return self.count, self.parts, self.rows, self.columns

    def send(self, parts: Sequence[jax.Array], to: Any, outputs: Sequence[Any], scratch: dict[str, Any]) -> None:
        """Sends a warpgroup's parts to thread block `to`."""
        share, warpgroup = lax.axis_index(AXIS), lax.axis_index("warpgroup")
        for at, part in enumerate(parts):
            if is_interpreted():
                outputs[0].at[lax.axis_index("sm"), to, warpgroup, share, at][...] = part
            else:
                plgpu.async_store_smem(
                    part,
                    scratch["shares"].at[warpgroup, share, at],
                    scratch["came"].at[warpgroup],
                    cluster_idx=to,
                    cluster_dim=AXIS,
                )

    def sent(self, scratch: dict[str, Any]) -> None:
        """Every warpgroup calls it behind its last `send` of a tile."""
        if is_interpreted():
            warpgroup = lax.axis_index("warpgroup")
            plgpu.barrier_arrive(scratch["sent"].at[warpgroup])
            plgpu.barrier_wait(scratch["sent"].at[warpgroup])

    def receive(self, outputs: Sequence[Any], scratch: dict[str, Any]) -> list[jax.Array]:
        """The sums over all shares of the parts that were sent here."""
        warpgroup = lax.axis_index("warpgroup")
        if is_interpreted():
            came = outputs[0].at[lax.axis_index("sm"), lax.axis_index(AXIS), warpgroup]
        else:
            plgpu.barrier_wait(scratch["came"].at[warpgroup])
            came = scratch["shares"].at[warpgroup]
        sums = []
        for at in range(self.parts):
            total = None
            for share in range(self.count):
                part = plgpu.load(came.at[share, at], layout=plgpu.Layout.WGMMA)
                total = part if total is None else total + part
            sums.append(total)
        return sums

    def take(self, scratch: dict[str, Any]) -> None:
        """Every warpgroup calls it at the end of a tile: what was sent may then be written over."""
        taken = scratch["taken"].at[lax.axis_index("warpgroup")]
        plgpu.commit_smem()  # all of the warpgroup has read
        plgpu.barrier_arrive(taken)
        plgpu.barrier_wait(taken)

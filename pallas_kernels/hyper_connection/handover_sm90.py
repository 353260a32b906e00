"""What thread blocks and warpgroups of mHC's one launch wait for."""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax

from pallas_kernels.hyper_connection.share_sm90 import Share


class Handover(NamedTuple):
    """written: a semaphore for each tile, which counts the thread blocks whose partials of it are in memory.
    finished: barriers of the thread block, for `lag` tiles of the team in turn: it has finished its tokens of one.
    stored: as many, None where who stores partials tells of them: it has stored its partials of one.
    """

    share: Share
    written: Any
    finished: Any
    stored: Any = None

    @property
    def lag(self) -> int:
        return self.finished.shape[0]

    def may_load(self, i: jax.Array) -> None:
        """Waits until the team's i-th tile may be loaded."""
        pl.when(i >= self.lag)(lambda: plgpu.barrier_wait(self.finished.at[lax.rem(i - self.lag, self.lag)]))

    def done(self, i: jax.Array) -> None:
        """Whoever stores the partials of the team's i-th tile has done so."""
        if self.stored is None:
            self.tell(i)
        else:
            plgpu.barrier_arrive(self.stored.at[lax.rem(i, self.lag)])

    def tell(self, i: jax.Array) -> None:
        """Tells that the partials of the team's i-th tile are in memory, once they are."""
        plgpu.semaphore_signal(self.written.at[self.share.tile(i)], memory_scope="gpu")

    def tell_all(self) -> None:
        """Tells of all tiles, by a warpgroup that does nothing else: until a tile is in memory takes 2000 cycles."""

        @pl.loop(0, self.share.tiles)
        def _tile(i):
            plgpu.barrier_wait(self.stored.at[lax.rem(i, self.lag)])
            self.tell(i)

    def wait_for(self, i: jax.Array) -> None:
        """Waits for everyone's partials of the tiles that round i is the first to finish tokens of."""

        @pl.loop(self.share.tiles_begun(i), self.share.tiles_begun(i + 1))
        def _tile(j):
            at = self.written.at[self.share.tile(j)]
            plgpu.semaphore_wait(at, self.share.cut.parts, decrement=False, memory_scope="gpu")

    def have_read(self, i: jax.Array) -> None:
        """Tells which tiles round i has been the last to finish tokens of, as far as L2's streams are concerned."""

        @pl.loop(self.share.tiles_finished(i), self.share.tiles_finished(i + 1))
        def _tile(j):
            plgpu.barrier_arrive(self.finished.at[lax.rem(j, self.lag)])


class Unsaid(NamedTuple):
    """Where partials are words that say themselves that they are there, and a thread block's tiles not more than `lag`.

    stored: a barrier of the thread block for each of the team's tiles: it has stored its partials of it.
    """

    share: Share
    stored: Any

    def may_load(self, _: Any) -> None: ...

    def done(self, i: jax.Array) -> None:
        plgpu.barrier_arrive(self.stored.at[i])

    def wait_for(self, i: jax.Array) -> None:
        """Until the thread block has stored its own partials: who looks for others' earlier slows down their loads."""

        @pl.loop(self.share.tiles_begun(i), self.share.tiles_begun(i + 1))
        def _tile(j):
            plgpu.barrier_wait(self.stored.at[j])

    def have_read(self, _: Any) -> None: ...


class Nothing:
    """For the simulated GPU: every launch finds what it needs in memory."""

    def may_load(self, _: Any) -> None: ...

    def done(self, _: Any) -> None: ...

    def wait_for(self, _: Any) -> None: ...

    def have_read(self, _: Any) -> None: ...

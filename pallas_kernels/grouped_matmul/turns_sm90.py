"""Consumers of one thread block that have the same rows and take stages by turns: a team, whose sums are added."""

# Pallas's types cannot be followed.
# pyright: reportArgumentType=false, reportAbstractUsage=false

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_matmul.pipeline_sm90 import WGMMA_ROWS


class Turns(NamedTuple):
    """`teams` of `turns` consumers each, with `parts` float32 sums [64, columns] a consumer."""

    teams: int
    turns: int
    parts: int
    columns: int

    @property
    def team(self) -> Any:
        return lax.div(lax.axis_index("warpgroup"), self.turns)

    @property
    def turn(self) -> Any:
        """Which of the team: of every `turns` stages, it takes this one."""
        return lax.rem(lax.axis_index("warpgroup"), self.turns)

    def scratch(self) -> dict[str, Any]:
        if self.turns == 1:
            return {}
        shape = (self.teams, self.turns - 1, self.parts, WGMMA_ROWS, self.columns)
        return {
            "sent": plgpu.SMEM(shape, jnp.float32),
            "team_met": plgpu.Barrier(num_arrivals=self.turns, num_barriers=self.teams),
        }

    def add_up(self, sums: Sequence[jax.Array], scratch: dict[str, Any], then: Callable[..., None]) -> None:
        """Calls `then` with the sums of the whole team, added in the order of turns, in its first consumer."""
        if self.turns == 1:
            then(list(sums))
            return
        team, turn = self.team, self.turn

        def meet() -> None:
            plgpu.barrier_arrive(scratch["team_met"].at[team])
            plgpu.barrier_wait(scratch["team_met"].at[team])

        @pl.when(turn > 0)
        def _send():
            for at, total in enumerate(sums):
                scratch["sent"][team, turn - 1, at] = total
            meet()
            meet()  # what was sent is read

        @pl.when(turn == 0)
        def _receive():
            meet()
            load = functools.partial(plgpu.load, layout=plgpu.Layout.WGMMA, optimized=False)
            whole = list(sums)
            for other in range(self.turns - 1):
                found = [load(scratch["sent"].at[team, other, at]) for at in range(len(sums))]
                whole = [a + b for a, b in zip(whole, found, strict=True)]
            meet()
            then(whole)

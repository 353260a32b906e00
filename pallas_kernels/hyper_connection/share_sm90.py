"""Which tiles and tokens of mHC's `pre` are a thread block's."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hyper_connection.tiling import STREAMS, TILE, TWO_FINISH, UNIT, PreTiling


class Cut(NamedTuple):
    """Thread blocks [team, part]: a team has every `teams`-th tile of 64 tokens, a member one part of the columns.

    finishers: warpgroups of a thread block that finish a token at a time.
    """

    tokens: int
    parts: int
    teams: int
    finishers: int

    @property
    def tiles(self) -> int:
        return -(-self.tokens // TILE)

    @property
    def blocks(self) -> int:
        return self.parts * self.teams

    @property
    def at_once(self) -> int:
        """Tokens that a team finishes at once."""
        return self.parts * self.finishers

    def least_lag(self, tiling: PreTiling) -> int:
        """Tiles between one that is loaded and one that must be finished, lest thread blocks wait for themselves.

        The tiles of a round of finishing, those in the buffers, and the one whose partials come next.
        """
        return -(-(self.at_once - 1) // TILE) + -(-tiling.stages // tiling.units) + 1


def cut(tokens: int, width: int, tiling: PreTiling, multiprocessors: int) -> Cut:
    """Over no more thread blocks than multiprocessors if the columns allow it: they wait for one another."""
    parts = STREAMS * width // (UNIT * tiling.units)
    teams = max(1, min(multiprocessors // parts, -(-tokens // TILE)))
    return Cut(tokens, parts, teams, 2 if width <= TWO_FINISH else 1)


class Share(NamedTuple):
    """A thread block's."""

    cut: Cut
    team: jax.Array
    part: jax.Array

    @property
    def tiles(self) -> jax.Array:
        """How many tiles the team has: `tile(i)` for i below it."""
        return lax.div(self.cut.tiles - self.team + self.cut.teams - 1, self.cut.teams)

    @property
    def rounds(self) -> jax.Array:
        """How many tokens each finisher has: `token(i, finisher)` for i below it; some may not exist, the first does."""
        rounds = lax.div(self.tiles * TILE + self.cut.at_once - 1, self.cut.at_once)
        return jnp.where(self.token(jnp.int32(0), 0) < self.cut.tokens, rounds, 0)

    def tile(self, i: jax.Array) -> jax.Array:
        return self.team + i * self.cut.teams

    def token(self, i: jax.Array, finisher: jax.Array | int) -> jax.Array:
        """Not less than the number of tokens where there is none."""
        of_team = (i * self.cut.finishers + finisher) * self.cut.parts + self.part
        return self.tile(lax.div(of_team, TILE)) * TILE + lax.rem(of_team, TILE)

    def tiles_begun(self, rounds: jax.Array) -> jax.Array:
        """Of how many of the team's tiles the first rounds finish tokens."""
        return jnp.minimum(lax.div(rounds * self.cut.at_once + TILE - 1, TILE), self.tiles)

    def tiles_finished(self, rounds: jax.Array) -> jax.Array:
        """Of how many of the team's tiles the first rounds finish all tokens."""
        return jnp.minimum(lax.div(rounds * self.cut.at_once, TILE), self.tiles)


def share(cut: Cut, block: jax.Array) -> Share:
    return Share(cut, lax.div(block, cut.parts), lax.rem(block, cut.parts))

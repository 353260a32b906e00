"""Which tiles and tokens of mHC's `pre` are a thread block's."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hyper_connection.tiling import STREAMS, TILE, UNIT, PreTiling

_OF_TILE = TILE.bit_length() - 1  # bits of a token's place in its tile


class Cut(NamedTuple):
    """Thread blocks [team, part]: a team has every `teams`-th tile of 64 tokens, a member one part of the columns.

    The team's members finish a token each in a round.
    """

    tokens: int
    parts: int
    teams: int

    @property
    def tiles(self) -> int:
        return -(-self.tokens // TILE)

    @property
    def blocks(self) -> int:
        return self.parts * self.teams

    @property
    def most_tiles(self) -> int:
        """Of a team."""
        return -(-self.tiles // self.teams)

    @property
    def most_rounds(self) -> int:
        return -(-self.most_tiles * TILE // self.parts)

    def least_lag(self, tiling: PreTiling) -> int:
        """Tiles between one that is loaded and one that must be finished, lest thread blocks wait for themselves.

        The tiles of a round of finishing, those in the buffers, and the one whose partials come next.
        """
        return -(-(self.parts - 1) // TILE) + -(-tiling.stages // tiling.units) + 1


def cut(tokens: int, width: int, tiling: PreTiling, multiprocessors: int) -> Cut:
    """Over no more thread blocks than multiprocessors if the columns allow it: they wait for one another."""
    parts = STREAMS * width // (UNIT * tiling.units)
    return Cut(tokens, parts, max(1, min(multiprocessors // parts, -(-tokens // TILE))))


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
        """How many tokens it finishes: `token(i)` for i below it; the last may not exist, the first does."""
        rounds = lax.div(self.tiles * TILE + self.cut.parts - 1, self.cut.parts)
        return jnp.where(self.token(jnp.int32(0)) < self.cut.tokens, rounds, 0)

    def tile(self, i: jax.Array) -> jax.Array:
        return self.team + i * self.cut.teams

    def token(self, i: jax.Array) -> jax.Array:
        """Not less than the number of tokens where there is none; i may be an array."""
        of_team = i * self.cut.parts + self.part
        return (self.tile(of_team >> _OF_TILE) << _OF_TILE) + (of_team & (TILE - 1))

    def rows(self, i: jax.Array, ring: int) -> jax.Array:
        """Where the rows of the team's i-th tile begin, where memory holds `ring` tiles of each team."""
        return (self.team * ring + lax.rem(i, ring)) * TILE

    def row(self, i: jax.Array, ring: int) -> jax.Array:
        """Where that of `token(i)` is."""
        of_team = i * self.cut.parts + self.part
        return self.rows(of_team >> _OF_TILE, ring) + (of_team & (TILE - 1))

    def tiles_begun(self, rounds: jax.Array) -> jax.Array:
        """Of how many of the team's tiles the first rounds finish tokens."""
        return jnp.minimum(lax.div(rounds * self.cut.parts + TILE - 1, TILE), self.tiles)

    def tiles_finished(self, rounds: jax.Array) -> jax.Array:
        """Of how many of the team's tiles the first rounds finish all tokens."""
        return jnp.minimum(lax.div(rounds * self.cut.parts, TILE), self.tiles)


def share(cut: Cut, block: jax.Array) -> Share:
    return Share(cut, lax.div(block, cut.parts), lax.rem(block, cut.parts))

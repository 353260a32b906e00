"""How the Hopper kernels cut a row: entries a tile, and what shared memory holds."""

from __future__ import annotations

from typing import NamedTuple

BLOCK = 2048  # entries of a thread block that looks for maxima
CHUNK, FEW = 4096, 1024  # entries that a warpgroup looks at at once, and of tiles' entries
SINGLE = 8192  # entries up to which tiles are single entries
MOST_CHOSEN, MOST_ENTRIES = 2048, 262144
TILES = 8, 16, 32


class RowTiling(NamedTuple):
    """tile: entries a tile. chunk: tiles or entries that are looked at at once, FEW at most where their number varies.

    held_keys, held_places: for how many there is room in shared memory, of tiles and of entries, and of entries alone.
    """

    tile: int
    chunk: int
    held_keys: int
    held_places: int
    sorted_entries: int


def default_tiling(columns: int, k: int) -> RowTiling:
    """The tile with the fewest keys to choose from, of tiles and then of the chosen tiles' entries."""
    if columns <= SINGLE:
        return tiled(columns, k, 1)
    return min((tiled(columns, k, tile) for tile in TILES), key=lambda tiling: columns // tiling.tile + k * tiling.tile)


def tiled(columns: int, k: int, tile: int) -> RowTiling:
    tiles = -(-columns // tile)
    candidates = min(k, tiles) * tile if tile > 1 else 1
    chunk = min(CHUNK, _power(max(tiles, candidates)))

    def room(n: int) -> int:
        return -(-n // chunk) * chunk

    return RowTiling(tile, chunk, max(room(tiles), room(candidates)), room(candidates), _power(k))


def _power(n: int) -> int:
    """The power of two that n things have room in, each of a warpgroup's threads having one or more."""
    return max(128, 1 << (n - 1).bit_length())

"""How the Hopper kernels cut a row: entries a tile, warpgroups, and what shared memory holds."""

from __future__ import annotations

from typing import NamedTuple

BLOCK = 2048  # entries of a thread block that looks for maxima
LANES = 128
CHUNK, LOAD, GATHER, FEW = 16, 32, 6, 2  # the most of a thread at once; see RowTiling
WARPGROUPS = 4
MOST_ROWS = 65535  # of a launch over rows: CUDA's limit of a grid's second axis
SINGLE = 8192  # entries up to which tiles are single entries
MOST_CHOSEN, MOST_ENTRIES = 2048, 262144
MOST_RANKED = 1024  # of more, shared memory has no room for those that are nearly among them, nor for spare tiles
SPARE = 128  # the most tiles above k: a bin of keys often holds some that are not needed
TILES = 8, 16, 32


class RowTiling(NamedTuple):
    """tile: entries a tile. spare: tiles that may be chosen above k.

    load, chunk, gather, few: how much a warpgroup looks at at once: tiles that come from afar, tiles in shared memory,
    fours of entries that come from afar, entries in shared memory.
    keys, picked, near, ranked, sorted_entries: for how many there is room in shared memory: tiles, chosen tiles, the
    entries of these, and the best ones, bin after bin or where those are sorted. The best lie in front; behind them the
    near ones; tiles where these are later, but for tiles of single entries.
    """

    tile: int
    warpgroups: int
    spare: int
    load: int
    chunk: int
    gather: int
    few: int
    keys: int
    picked: int
    near: int
    ranked: int
    sorted_entries: int

    @property
    def near_from(self) -> int:
        return max(self.ranked, self.sorted_entries)

    @property
    def keys_from(self) -> int:
        return self.near_from + (self.near if self.tile == 1 else 0)

    @property
    def held_keys(self) -> int:
        return max(self.keys_from + self.keys, self.near_from + self.near)

    @property
    def held_places(self) -> int:
        return self.near_from + self.near


def default_tiling(columns: int, k: int) -> RowTiling:
    """The tile with the fewest keys to choose from, of tiles and then of the chosen tiles' entries."""
    if columns <= SINGLE:
        return tiled(columns, k, 1)
    return min((tiled(columns, k, tile) for tile in TILES), key=lambda tiling: columns // tiling.tile + k * tiling.tile)


def tiled(columns: int, k: int, tile: int, warpgroups: int | None = None) -> RowTiling:
    tiles = -(-columns // tile)
    if warpgroups is None:
        warpgroups = min(WARPGROUPS, _power(tiles) // LANES)
    threads = warpgroups * LANES
    spare = min(k // 4, SPARE) if k <= MOST_RANKED else 0
    picked = min(k + spare, tiles)
    near, whole = picked * tile, max(_power(k), threads)
    ranked = k + spare + SPARE if k <= MOST_RANKED else 0

    def chunk(most: int, n: int) -> int:
        return LANES * min(most, -(-n // threads))

    def room(n: int, *chunks: int) -> int:
        return max(-(-n // (warpgroups * chunk)) * warpgroups * chunk for chunk in chunks)

    load, passed, gather, few = chunk(LOAD, tiles), chunk(CHUNK, tiles), chunk(GATHER, near // 4), chunk(FEW, near)
    return RowTiling(
        tile, warpgroups, spare, load, passed, gather, few,
        room(tiles, load, passed), picked, max(room(near, few), whole), room(ranked, few), whole,
    )  # fmt: skip


def _power(n: int) -> int:
    """The power of two that n things have room in, each of a warpgroup's threads having one or more."""
    return max(LANES, 1 << (n - 1).bit_length())

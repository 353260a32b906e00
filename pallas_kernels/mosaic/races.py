"""Races found as the interpreter finds them, in a fraction of its time.

Its race detector compares every access of a buffer with all that came before, one after the other in Python, which took
a third of the router's tests. Here NumPy passes over those that cannot race, ordered ones and ones elsewhere in the
buffer, all at once; what is left goes to the detector itself, which decides and tells.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

EVERYWHERE = -(2**62), 2**62


@contextlib.contextmanager
def quick_races() -> Iterator[None]:
    """A jax whose detector is another one keeps its own."""
    from jax._src.pallas.mosaic.interpret import race_detection_state

    detector = race_detection_state.RaceDetectionState
    checks = {"check_read": ("writes",), "check_write": ("writes", "reads")}
    if not all(hasattr(detector, name) for name in checks):
        yield
        return
    usual = {name: getattr(detector, name) for name in checks}
    for name, others in checks.items():
        kind = name.removeprefix("check_") + "s"
        setattr(detector, name, functools.partialmethod(_check, usual[name], kind, others))
    try:
        yield
    finally:
        for name, check in usual.items():
            setattr(detector, name, check)


class History:
    """Accesses of a buffer, as the detector keeps them, and of each its clock and the bounds of its range in a row."""

    def __init__(self) -> None:
        self.accesses: list[Any] = []
        self._clocks = self._bounds = np.empty((0, 0), np.int64)

    def append(self, access: Any, clock: np.ndarray, bounds: np.ndarray) -> None:
        count = len(self.accesses)
        if count == len(self._clocks):  # rows that others still look at stay as they are
            self._clocks = _longer(self._clocks, count, clock)
            self._bounds = _longer(self._bounds, count, bounds)
        self._clocks[count], self._bounds[count] = clock, bounds
        self.accesses.append(access)

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        count = len(self.accesses)
        return self._clocks[:count], self._bounds[:count]


def _longer(rows: np.ndarray, count: int, row: np.ndarray) -> np.ndarray:
    longer = np.empty((max(16, 2 * count), *row.shape), np.int64)
    longer[:count] = rows.reshape(count, *row.shape)
    return longer


def _check(
    state: Any, usual: Any, kind: str, others: tuple[str, ...], thread, clock, key, rnge, source_info=None
) -> None:
    """`usual`, of only those earlier accesses among `others` that may be in a race with this one."""
    alone = _knowing(state, {})
    usual(alone, thread, clock, key, rnge, source_info)
    access, now, bounds = getattr(alone, kind)[key][-1], np.array(clock.clock, np.int64), _bounds(rnge)
    with state.lock:  # of two accesses at the same time, at least one sees the other
        histories = vars(state).setdefault("histories", collections.defaultdict(History))
        before = {name: (histories[name, key].accesses, *histories[name, key].rows()) for name in others}
        histories[kind, key].append(access, now, bounds)
    suspects = {
        name: {key: [accesses[i] for i in _suspects(clocks, places, now, bounds)]}
        for name, (accesses, clocks, places) in before.items()
        if len(clocks)
    }
    if any(found[key] for found in suspects.values()):
        few = _knowing(state, suspects)
        usual(few, thread, clock, key, rnge, source_info)
        state.races_found |= few.races_found


def _suspects(clocks: np.ndarray, places: np.ndarray, now: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Which accesses are neither before nor after, and may overlap."""
    unordered = (clocks <= now).all(1) == (clocks >= now).all(1)  # as the detector has it: nor is one of the same clock
    overlap = (places[:, 0] < bounds[1]) & (bounds[0] < places[:, 1])
    return np.flatnonzero(unordered & overlap.all(1))


def _bounds(rnge: tuple[Any, ...]) -> np.ndarray:
    """[2, axes]: where a range starts, and where it ends. An empty one has a place all the same, as in the detector."""
    found = []
    for part in rnge:
        if not isinstance(part, slice):
            found.append((part, part + 1))
        elif part.start is None or part.stop is None:
            found.append(EVERYWHERE)
        else:
            found.append((part.start, max(part.stop, part.start + 1)))
    return np.array(found, np.int64).reshape(-1, 2).T


def _knowing(state: Any, accesses: dict[str, dict[Any, list[Any]]]) -> Any:
    """The detector with these accesses in place of all."""
    detector = copy.copy(state)
    for name in ("reads", "writes"):
        setattr(detector, name, collections.defaultdict(list, accesses.get(name, {})))
    detector.races_found = False
    return detector

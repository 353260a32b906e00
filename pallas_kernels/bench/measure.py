"""One case of a benchmark, measured: rows of results, one for every implementation of ours."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench import peer_files
from pallas_kernels.bench.case import Bench
from pallas_kernels.bench.timing import input_sets, microseconds, timed_calls
from pallas_kernels.bench.turns import compiled, turn

Row = dict[str, Any]
PATIENCE = 120  # seconds for an implementation, compilation included
INPUTS = "inputs: "  # what a reason starts with where it is that of no implementation


class DeviceLost(RuntimeError):
    """A kernel failed in such a way that this process cannot use the device any more."""


def identity(op: str, case: str, which: str | None, tuning: bool, device: str) -> tuple[Any, ...]:
    """What makes a row: it is not measured twice."""
    return op, case, which, tuning, device


def row_identity(row: Row) -> tuple[Any, ...]:
    return identity(row["op"], row["case"], row["which"], row["tuning"], row["device"])


def settled(row: Row) -> bool:
    """Whether a run that is resumed leaves it: where the inputs could not be made, no implementation was tried."""
    return not str(row.get("reason") or "").startswith(INPUTS)


def beside(others: bool, peers: Path | None) -> list[str]:
    """Who is to be timed beside ours."""
    return ["xla", *(["peer"] if peers is not None else [])] if others else []


def was_beside(row: Row) -> set[str]:
    """Who was timed beside ours, or had no such kernel. A peer that failed was not: a resumed run tries it again."""
    return set(row.get("beside", ())) - ({"peer"} if peer_failure(row) else set())


def peer_failure(row: Row) -> str | None:
    """Why the peer has no time in this row; None if it has one, or was not asked."""
    peer = row.get("peer_us")
    return peer if isinstance(peer, str) else None


def rows(
    case: Bench,
    *,
    tuning: bool,
    others: bool,
    peers: Path | None,
    finished: set[tuple[Any, ...]],
    stuck: Callable[[Row], None],
    lock: Path | None = None,
) -> Iterator[Row]:
    """The rows of a case that are not `finished`: of every implementation if `tuning`, else of the usual one.

    others (not with `tuning`): XLA is timed beside it, and the peer in the directory `peers`. What fails or is wrong
    has its reason in place of a time.
    stuck: called from another thread, with the row, when an implementation takes PATIENCE seconds: a kernel that waits
    for ever cannot be stopped but with the process.
    lock: of `turns.turn`. What makes inputs is compiled while it is held, everything else before.
    Raises DeviceLost, behind the row of the implementation that lost it.
    """
    device = jax.devices()[0].device_kind
    names: list[str | None] = [*case.ours] if tuning else [case.usual]
    names = [name for name in names if identity(case.op, case.name, name, tuning, device) not in finished]
    if not names:
        return
    assert not (tuning and others), "one figure of XLA and the peer is enough"
    if lock is not None:
        case = _compiled(case, names, others)
        if others and peers is not None and case.peer is not None:
            _peer(peers, case)  # compiles what it needs when it first runs
    who = beside(others, peers)
    version = peer_files.version(peers, case.peer[0]) if others and peers is not None and case.peer else None
    with turn(lock):
        yield from _measured(case, names, functools.partial(_row, case, tuning, who, version), who, peers, stuck)


def _compiled(case: Bench, names: list[str | None], others: bool) -> Bench:
    """The case, ready to run."""
    shapes = case.shapes()
    ours = {name: compiled(run, shapes) if name in names else run for name, run in case.ours.items()}
    xla = {name: compiled(run, shapes) for name, run in case.xla.items()} if others else case.xla
    return dataclasses.replace(case, ours=ours, xla=xla, reference=compiled(case.reference, shapes))


def _measured(
    case: Bench,
    names: list[str | None],
    row: Callable[..., Row],
    beside: list[str],
    peers: Path | None,
    stuck: Callable[[Row], None],
) -> Iterator[Row]:
    try:
        sets = case.sets(input_sets(case.nbytes))
        want = jax.block_until_ready(case.reference(sets[0]))
        unused = jax.tree.map(jnp.copy, sets[0]) if case.in_place else None
    except Exception as error:
        for name in names:
            yield row(name, f"{INPUTS}{_reason(error)}", {}, None, 0)
        return
    calls = timed_calls(len(sets))
    xla = {name: _timed(run, sets) for name, run in case.xla.items()} if "xla" in beside else {}
    peer = None
    for name in names:
        with _watched(lambda: stuck(row(name, f"stuck for {PATIENCE} s", xla, None, calls))):  # noqa: B023
            time = _ours(case, name, sets, unused, want)
        lost = isinstance(time, str) and not _alive()
        if peers is not None and "peer" in beside and case.peer is not None and not lost:
            sets.clear()  # there is one name only, and the peer's framework needs the memory
            peer = _peer(peers, case)
        yield row(name, time, xla, peer, calls)
        if lost:
            raise DeviceLost(time)


@contextlib.contextmanager
def _watched(late: Callable[[], None]) -> Iterator[None]:
    """Calls `late` from another thread if the block takes PATIENCE seconds."""
    timer = threading.Timer(PATIENCE, late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _ours(case: Bench, name: str | None, sets: list[Any], unused: Any, want: Any) -> float | str:
    """unused: the first set as it was made, where whoever was timed before has replaced it; else None."""
    if name is None:
        return "no kernel takes it"

    def wrong(run: Callable[[Any], Any]) -> str | None:
        return case.wrong(run(sets[0] if unused is None else jax.tree.map(jnp.copy, unused)), want)

    return _timed(case.ours[name], sets, wrong)


def _timed(
    run: Callable[[Any], Any], sets: list[Any], wrong: Callable[[Callable[[Any], Any]], str | None] | None = None
) -> float | str:
    """Microseconds, or why there are none: a tiling that does not fit must not end the run."""
    try:
        if wrong is not None and (reason := wrong(run)):
            return f"wrong: {reason}"
        return microseconds(run, sets)
    except Exception as error:
        return _reason(error)


def _alive() -> bool:
    """Whether the device still computes: after an illegal access it never does again."""
    try:
        return bool(jax.device_put(1) + 1 == 2)
    except Exception:
        return False


def _peer(directory: Path, case: Bench) -> float | str:
    from pallas_kernels.bench.peers import time_peer

    assert case.peer is not None
    try:
        return time_peer(directory, case.peer, case.nbytes)
    except Exception as error:
        return _reason(error)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def _row(
    case: Bench,
    tuning: bool,
    asked_beside: list[str],
    peer_version: str | None,
    which: str | None,
    time: float | str,
    xla: dict[str, float | str],
    peer: float | str | None,
    calls: int,
) -> Row:
    us = time if isinstance(time, float) else None
    choice = case.choices.get(which or "")
    best_xla = min((time for time in xla.values() if isinstance(time, float)), default=None)
    return {
        "op": case.op,
        "case": case.name,
        "tuning": tuning,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "commit": commit(),
        "shape": case.shape,
        "which": which,
        "kind": choice.kind if choice else None,
        "problem": str(choice.problem) if choice else None,
        "tiling": dataclasses.asdict(choice.tiling) if choice else None,
        "us": us,
        "reason": None if us else time,
        "tflops": case.flops / us / 1e6 if us else None,
        "gbps": case.nbytes / us / 1e3 if us else None,
        "limit_us": case.limit,
        "share": case.limit / us if us else None,
        "bound": case.bound,
        "calls": calls,
        "nbytes": case.nbytes,
        "flops": case.flops,
        "beside": asked_beside,
        "xla_us": best_xla,
        "xla": xla,
        "peer_us": peer,
        "peer_version": peer_version,
        "ratio": peer / us if us and isinstance(peer, float) else None,
    }


@functools.cache
def commit() -> str | None:
    """Of the checkout that this is run from, None where it is none."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None

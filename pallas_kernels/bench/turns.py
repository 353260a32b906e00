"""Several benchmarks of one device: all compile at once, and take turns at the device.

Two cores' worth of compilation stand behind a second of measuring, so that a run of every case is mostly waiting for
compilers. Processes that name the same lock file measure one case at a time each, alone on the device.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax


@contextlib.contextmanager
def turn(lock: Path | None) -> Iterator[None]:
    """Waits until no other process is in such a block with the same file; None: nobody else is there."""
    if lock is None:
        yield
        return
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file is closed, and so when the process dies
        yield


def compiled(run: Callable[[Any], Any], inputs: Any) -> Callable[[Any], Any]:
    """`run`, a jitted function or a partial of one, compiled for inputs like these (shapes will do).

    What is neither, or fails to compile, comes back as it is: where it is measured its error has a place to go.
    """
    function, *given = (run.func, *run.args) if isinstance(run, functools.partial) else (run,)
    keywords = run.keywords if isinstance(run, functools.partial) else {}
    lower = getattr(function, "lower", None)
    if lower is None or any(isinstance(x, jax.Array) for x in jax.tree.leaves((given, keywords))):
        return run
    try:
        return lower(*given, inputs, **keywords).compile()
    except Exception:
        return run

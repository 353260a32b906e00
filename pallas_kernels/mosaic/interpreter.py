"""Kernels on a CPU: the Mosaic GPU interpreter simulates threads, shared memory, barriers and copies; it sees races."""

from __future__ import annotations

import contextlib
import contextvars
import io
from collections.abc import Iterator

import jax.experimental.pallas.mosaic_gpu as plgpu

# Thread blocks of a simulated grid: enough for more than one to work, and for each to have more than one tile.
INTERPRETED_SMS = 2
_interpreted: contextvars.ContextVar[bool] = contextvars.ContextVar("kernels are interpreted", default=False)


class RaceError(AssertionError):
    """Two threads of an interpreted kernel touched the same memory without a barrier between them."""


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels traced in the block run in the interpreter, on few simulated multiprocessors, with race detection.

    Results must be ready when the block ends. Raises RaceError naming the accesses.
    """
    token = _interpreted.set(True)
    printed = io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(printed),
            plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)),
        ):
            yield
    finally:
        _interpreted.reset(token)
    if "RACE DETECTED" in (text := printed.getvalue()):
        raise RaceError(text)


def is_interpreted() -> bool:
    return _interpreted.get()

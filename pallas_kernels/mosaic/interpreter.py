"""Kernels on a CPU: the Mosaic GPU interpreter simulates threads, shared memory, barriers and copies; it sees races."""

from __future__ import annotations

import contextlib
import contextvars
import io
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from pallas_kernels.mosaic.races import quick_races

# Thread blocks of a simulated grid: enough for more than one to work, and for each to have more than one tile.
INTERPRETED_SMS = 2
LEAST_THREADS = 4  # of XLA on the CPU: with two and three, attention was seen to wait for ever
_RACE = "RACE DETECTED"
_interpreted: contextvars.ContextVar[bool] = contextvars.ContextVar("kernels are interpreted", default=False)


class RaceError(AssertionError):
    """Two threads of an interpreted kernel touched the same memory without a barrier between them."""


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels traced in the block run in the interpreter, on few simulated multiprocessors, with race detection.

    Results must be ready when the block ends. Raises RaceError naming the accesses, and RuntimeError where XLA has
    threads too few on the CPU: every thread of a kernel takes one, and waits for the others.
    """
    threads = int(os.environ.get("NPROC") or os.cpu_count() or 1)
    if threads < LEAST_THREADS:
        raise RuntimeError(
            f"XLA has {threads} threads, and an interpreted kernel would wait for ever: set NPROC=16 before jax starts"
        )
    import jax.experimental.pallas.mosaic_gpu as plgpu  # slow to import, and not on every platform
    from jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks import reset_gpu_interpret_mode_state

    token = _interpreted.set(True)
    printed = io.StringIO()
    params = plgpu.InterpretGPUParams(detect_races=True)
    try:
        with contextlib.redirect_stdout(printed), plgpu.force_gpu_interpret_mode(params):
            with _callbacks_on_the_host(), quick_races():
                yield
    except Exception as error:
        reset_gpu_interpret_mode_state()  # else every kernel to come would fail like this one
        if _RACE in str(error):  # jax from 0.12 on raises, before that it prints
            raise RaceError(str(error)) from error
        raise
    finally:
        _interpreted.reset(token)
    if _RACE in (text := printed.getvalue()):
        raise RaceError(text)


@contextlib.contextmanager
def _callbacks_on_the_host() -> Iterator[None]:
    """The interpreter's callbacks get their arguments as NumPy arrays.

    jax puts each on a device first, every index too, which takes a third of the router tests' time. A jax that has not
    what is replaced here takes that time.
    """
    from jax._src import callback as callbacks
    from jax._src.pallas.mosaic_gpu.interpret import shared_memory

    if not (hasattr(callbacks, "io_callback_impl") and hasattr(shared_memory, "_to_int")):
        yield
        return

    def call(*args: Any, callback: Any, **_: Any) -> Any:
        return jax.tree.map(np.asarray, callback(*map(np.array, args)))

    def to_int(x: Any) -> Any:
        return x if isinstance(x, Tracer) else int(x)

    with _replaced(callbacks, "io_callback_impl", call), _replaced(shared_memory, "_to_int", to_int):
        yield


@contextlib.contextmanager
def _replaced(module: Any, name: str, new: Any) -> Iterator[None]:
    usual = getattr(module, name)
    setattr(module, name, new)
    try:
        yield
    finally:
        setattr(module, name, usual)


def is_interpreted() -> bool:
    return _interpreted.get()

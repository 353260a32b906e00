"""Kernels on a CPU: the Mosaic GPU interpreter simulates threads, shared memory, barriers and copies; it sees races."""

from __future__ import annotations

import contextlib
import contextvars
import io
from collections.abc import Iterator

# Thread blocks of a simulated grid: enough for more than one to work, and for each to have more than one tile.
INTERPRETED_SMS = 2
_RACE = "RACE DETECTED"
_interpreted: contextvars.ContextVar[bool] = contextvars.ContextVar("kernels are interpreted", default=False)


class RaceError(AssertionError):
    """Two threads of an interpreted kernel touched the same memory without a barrier between them."""


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels traced in the block run in the interpreter, on few simulated multiprocessors, with race detection.

    Results must be ready when the block ends. Raises RaceError naming the accesses.
    """
    import jax.experimental.pallas.mosaic_gpu as plgpu  # slow to import, and not on every platform
    from jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks import reset_gpu_interpret_mode_state

    token = _interpreted.set(True)
    printed = io.StringIO()
    params = plgpu.InterpretGPUParams(detect_races=True)
    try:
        with contextlib.redirect_stdout(printed), plgpu.force_gpu_interpret_mode(params):
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


def is_interpreted() -> bool:
    return _interpreted.get()

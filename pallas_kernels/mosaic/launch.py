"""What jax versions and devices differ in: the shape of a launch, and stores; and what a launch writes of its time."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.device import default_device
from pallas_kernels.mosaic.interpreter import INTERPRETED_SMS, is_interpreted

H100_SMS = 132
PHASES = 60  # of a warpgroup that a timeline has room for: 16 bytes of shared memory each
_timeline: contextvars.ContextVar[tuple[Path, int] | None] = contextvars.ContextVar("timeline", default=None)


@contextlib.contextmanager
def timeline(directory: Path, phases: int = PHASES) -> Iterator[None]:
    """Kernels traced in the block write when each warpgroup enters and leaves its phases (`jax.named_scope`).

    A launch leaves a file of Chrome trace events in `directory`, an existing one: the first `phases` of each
    warpgroup, in cycles of its multiprocessor. Kernels that were traced before do not.
    """
    token = _timeline.set((directory, phases))
    try:
        yield
    finally:
        _timeline.reset(token)


def compiler_params(**how: Any) -> Any:
    """plgpu.CompilerParams, with a timeline where one is asked for."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    if (asked := _timeline.get()) is not None:
        directory, phases = asked
        how |= {"profile_space": phases, "profile_dir": str(directory), "profile_bounds_check": True}
    return plgpu.CompilerParams(**how)


def sm_count() -> int:
    """Multiprocessors a persistent kernel spreads over: the device's, few in the interpreter, an H100's elsewhere."""
    if is_interpreted():
        return INTERPRETED_SMS
    return int(getattr(default_device(), "core_count", H100_SMS))


def store_narrow(ref: Any, index: Any, value: jax.Array) -> None:
    """ref[index] = value, less than 4 bytes a thread or parts of cache lines: from jax 0.12 on to be asked for."""
    import jax.experimental.pallas.mosaic_gpu as plgpu  # slow to import: tables of tilings need this file too

    if store := getattr(plgpu, "store", None):
        store(ref.at[index], value, optimized=False)
    else:
        ref[index] = value

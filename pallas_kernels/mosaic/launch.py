"""What jax versions and devices differ in: the shape of a launch, and stores."""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.mosaic.interpreter import INTERPRETED_SMS, is_interpreted

H100_SMS = 132


def sm_count() -> int:
    """Multiprocessors a persistent kernel spreads over: the device's, few in the interpreter, an H100's elsewhere."""
    if is_interpreted():
        return INTERPRETED_SMS
    return int(getattr(jax.local_devices()[0], "core_count", H100_SMS))


def store_narrow(ref: Any, index: Any, value: jax.Array) -> None:
    """ref[index] = value, less than 4 bytes a thread or parts of cache lines: from jax 0.12 on to be asked for."""
    import jax.experimental.pallas.mosaic_gpu as plgpu  # slow to import: tables of tilings need this file too

    if store := getattr(plgpu, "store", None):
        store(ref.at[index], value, optimized=False)
    else:
        ref[index] = value

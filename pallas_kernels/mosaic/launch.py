"""The shape of a launch."""

from __future__ import annotations

import jax

from pallas_kernels.mosaic.interpreter import INTERPRETED_SMS, is_interpreted

H100_SMS = 132


def sm_count() -> int:
    """Multiprocessors a persistent kernel spreads over: the device's, few in the interpreter, an H100's elsewhere."""
    if is_interpreted():
        return INTERPRETED_SMS
    return int(getattr(jax.local_devices()[0], "core_count", H100_SMS))

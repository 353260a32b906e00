"""Time of kernels on the device, by CUPTI, the same way for ours, XLA's and a peer's.

A figure is the median over calls of the summed durations of the kernels that one call launches. Gaps between launches
are not in it, nor are copies, but for those that XLA launches in a graph, as kernels. Calls rotate among enough input
sets to overflow the L2 cache.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax

L2_BYTES = 256_000_000  # five times an H100's
CALLS = 60


def input_sets(nbytes: int) -> int:
    """How many sets of inputs of `nbytes` a benchmark rotates among: one where it alone is far larger than the L2."""
    if nbytes > 4 * L2_BYTES:
        return 1
    return max(2, min(64, -(-L2_BYTES // max(nbytes, 1))))


def timed_calls(sets: int) -> int:
    """How many calls a figure is the median of."""
    return max(1, CALLS // sets) * sets


def microseconds(call: Callable[[Any], Any], sets: Sequence[Any], wait: Callable[[], None] | None = None) -> float:
    """Median microseconds of `call(inputs)` over the input sets; `wait` finishes what jax does not know of.

    Raises RuntimeError where calls launch different numbers of kernels, or none.
    """
    from jax._src.lib import mosaic_gpu as library

    def finish(results: list[Any]) -> None:
        jax.block_until_ready([x for x in results if x is not None])
        if wait is not None:
            wait()

    finish([call(inputs) for inputs in sets])
    calls = timed_calls(len(sets))
    extension = library._mosaic_gpu_ext  # pyright: ignore[reportPrivateImportUsage]
    extension._cupti_init()
    try:
        finish([call(inputs) for _ in range(calls // len(sets)) for inputs in sets])
    finally:
        kernels = extension._cupti_get_timings(True)
    if not kernels or len(kernels) % calls:
        raise RuntimeError(f"{len(kernels or ())} kernels in {calls} calls: a call must launch the same ones each time")
    each = len(kernels) // calls
    totals = [sum(time for _, time in kernels[i * each : (i + 1) * each]) for i in range(calls)]
    return statistics.median(totals) * 1e3

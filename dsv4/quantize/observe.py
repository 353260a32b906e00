"""What the inputs of each weight look like on real text.

The model runs once over windows of tokens, in float32, with its weights wrapped so that each shows its input. Of every
input only two small arrays are kept: the largest magnitude of each channel, and a histogram of all magnitudes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from dsv4.config import ConfigError, Execution
from dsv4.config.storage import TREATED_CLASSES
from dsv4.model.handle import Model
from dsv4.parameters import leaves, model_specs, nest, tensor_name
from pallas_kernels.quant import ObservedWeight, observe
from pallas_kernels.quant.hadamard import rotate_blocks

# A bin is a float32's exponent and the first three bits of its mantissa: eight an octave, over all that float32 holds.
KEPT_BITS = 3
BINS = 256 << KEPT_BITS
FINITE_BINS = 255 << KEPT_BITS  # the bins from here on are infinity and NaN


@dataclass(frozen=True)
class Statistics:
    """Of all inputs of one weight. channel_amax float32 [in]: as they came. histogram int64 [BINS] of magnitudes, and
    their largest, `amax`: as the weight sees them, rotated and without the channels that are kept in 16 bits.
    """

    channel_amax: np.ndarray
    histogram: np.ndarray
    amax: float


def observe_inputs(
    model: Model,
    windows: np.ndarray,
    *,
    channels: Mapping[str, np.ndarray] | None = None,
    rotate: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Statistics]:
    """Statistics by weight (dense and routed experts, MTP blocks included) over token ids `windows` [N, T].

    channels: input channels that each weight keeps in 16 bits. rotate: as in the recipe. progress: called with (windows
    done, windows in all). Raises ConfigError naming a weight whose input is not finite.
    """
    exact = Execution(dtype="float32", implementation="reference")
    observed = model.replace(params=_observed(model), execution=exact)
    isolated = {name: jnp.asarray(found, jnp.int32) for name, found in (channels or {}).items()}
    found: dict[str, Statistics] = {}
    for done, window in enumerate(windows, 1):
        seen = _window_statistics(observed, jnp.asarray(window[None], jnp.int32), isolated, rotate)
        for name, new in jax.device_get(seen).items():
            found[name] = _merged(found.get(name), *new)
        if progress is not None:
            progress(done, len(windows))
    for name, statistics in found.items():
        if statistics.histogram[FINITE_BINS:].any():
            raise ConfigError(f"calibration: the input of {name} is not finite on this text; no scale fits it")
    return found


def _observed(model: Model) -> dict[Any, Any]:
    """The parameters with every weight that may have a static scale wrapped."""

    def wrapped(path: tuple[Any, ...], kind: str) -> Any:
        leaf: Any = functools.reduce(lambda node, part: node[part], path, model.params)
        return ObservedWeight(leaf, tensor_name(path)) if kind in TREATED_CLASSES else leaf

    return nest((path, wrapped(path, spec.kind)) for path, spec in leaves(model_specs(model.config)))


@functools.partial(jax.jit, static_argnums=3)
def _window_statistics(
    model: Model, ids: Int32[Array, "1 T"], channels: dict[str, Int32[Array, " n"]], rotate: bool
) -> dict[str, tuple[Float32[Array, " in"], Int32[Array, " bins"], Float32[Array, ""]]]:
    with observe() as seen, jax.default_matmul_precision("highest"):
        module = model.bind()
        count = jnp.full(1, ids.shape[1], jnp.int32)
        trace = module(ids, count, None)[2]
        for block in range(model.config.mtp_blocks):
            module.predict_next(trace.layers[-1].streams[:, :-1], ids[:, 1:], block)
    found: dict[str, tuple] = {}
    for name, x in seen:
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        channel_amax = jnp.max(jnp.abs(rows), axis=0)
        if name in channels:
            rows = rows.at[:, channels[name]].set(0)
        rows = jnp.abs(rotate_blocks(rows) if rotate else rows)
        new = channel_amax, _histogram(rows), jnp.max(rows)
        found[name] = _both(found[name], new) if name in found else new
    return found


def _histogram(magnitudes: Float[Array, "rows columns"]) -> Int[Array, " bins"]:
    bins = jax.lax.bitcast_convert_type(magnitudes, jnp.uint32) >> (23 - KEPT_BITS)
    return jnp.zeros(BINS, jnp.int32).at[bins.reshape(-1)].add(1)


def _both(a: tuple, b: tuple) -> tuple:
    return jnp.maximum(a[0], b[0]), a[1] + b[1], jnp.maximum(a[2], b[2])


def bin_edges() -> np.ndarray:
    """Where the finite bins begin, and where the last of them ends: float64 [FINITE_BINS + 1]."""
    starts = (np.arange(FINITE_BINS, dtype=np.uint32) << (23 - KEPT_BITS)).view(np.float32).astype(np.float64)
    return np.append(starts, 2.0**128)


def _merged(old: Statistics | None, channel_amax: np.ndarray, histogram: np.ndarray, amax: np.ndarray) -> Statistics:
    new = Statistics(channel_amax, histogram.astype(np.int64), float(amax))
    if old is None:
        return new
    return Statistics(
        np.maximum(old.channel_amax, new.channel_amax), old.histogram + new.histogram, max(old.amax, new.amax)
    )

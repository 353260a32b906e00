"""The one scale that serves all inputs of a weight best, from their statistics."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from dsv4.quantize.observe import FINITE_BINS, Statistics, bin_edges
from pallas_kernels.formats import QuantFormat
from pallas_kernels.quant import dequantize, quantize
from pallas_kernels.typing import typed

Method = Literal["absmax", "percentile", "mse"]
PERCENTILE = 99.99
_POINTS = 4  # the values of a bin are taken to lie at so many places
_OCTAVES = 12  # how far below the largest magnitude the search for a scale goes


def input_scale(
    statistics: Statistics, form: QuantFormat, method: Method = "absmax", *, percentile: float = PERCENTILE
) -> float:
    """The scale of a whole input for activations in `form`, of which only the element counts; a normal float32.

    absmax: nothing saturates. percentile: this share (in percent) of the magnitudes does not. mse: the least expected
    squared error, rounding and saturation together.
    """
    amax = max(statistics.amax, form.amax_floor)
    if method == "percentile":
        amax = max(min(amax, _quantile(statistics.histogram, percentile)), form.amax_floor)
    elif method == "mse":
        amax = max(amax * _best_fraction(statistics, form), form.amax_floor)
    return float(np.float32(amax) * np.float32(1 / form.largest))


def _quantile(histogram: np.ndarray, percentile: float) -> float:
    """The upper edge of the bin up to which `percentile` percent of the magnitudes lie."""
    upto = np.cumsum(histogram[:FINITE_BINS])
    return float(bin_edges()[1 + np.searchsorted(upto, upto[-1] * percentile / 100)])


def _best_fraction(statistics: Statistics, form: QuantFormat) -> float:
    """The largest magnitude that should not saturate, as a fraction of the largest there is: eighths of octaves."""
    if statistics.amax <= form.amax_floor:
        return 1.0
    edges = np.minimum(bin_edges() / statistics.amax, 1.0)  # in units of the largest: float32 holds their squares
    inside = (np.arange(_POINTS) + 0.5) / _POINTS
    points = edges[:-1, None] + np.diff(edges)[:, None] * inside
    share = statistics.histogram[:FINITE_BINS] / statistics.histogram.sum()
    weights = np.repeat(share / _POINTS, _POINTS)
    fractions = np.exp2(-np.arange(8 * _OCTAVES + 1) / 8)
    flat = points.reshape(-1)
    first = int(np.searchsorted(flat, 2.0**-40))  # smaller ones add nothing
    element = dataclasses.replace(form, tile=(1, None), floor=None)
    errors = _errors(
        jnp.asarray(_tail(flat, first), jnp.float32),
        jnp.asarray(_tail(weights, first), jnp.float32),
        jnp.asarray(fractions / form.largest, jnp.float32),
        element,
    )
    return float(fractions[int(np.argmin(np.asarray(errors)))])


def _tail(x: np.ndarray, first: int) -> np.ndarray:
    """x from `first` on, filled up with zeros to one length, so that one compiled program serves all weights."""
    room = 64 * 8 * _POINTS
    kept = x[first : first + room]
    return np.pad(kept, (0, room - len(kept)))


@functools.partial(jax.jit, static_argnums=3)
@typed
def _errors(
    points: Float32[Array, " p"], weights: Float32[Array, " p"], scales: Float32[Array, " s"], form: QuantFormat
) -> Float32[Array, " s"]:
    """Expected squared rounding error of the weighted points under each scale."""
    rows = jnp.broadcast_to(points, (scales.shape[0], points.shape[0]))
    rounded = dequantize(quantize(rows, form, scale=scales[:, None]))
    return jnp.sum((rounded - rows) ** 2 * weights[None], axis=1)

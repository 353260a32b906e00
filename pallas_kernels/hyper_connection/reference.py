"""The definition of mHC: coefficients in float32 from the flattened, normalised streams.

mix = (f @ fn.T) * rsqrt(mean(f^2) + norm_eps) of the n streams flattened, f [n*D]; times a scale for each of
its three parts, plus base: pre = sigmoid + eps of n channels, post = 2 * sigmoid of n, comb = sinkhorn of n x n.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.formats import QuantFormat
from pallas_kernels.norm import rms_norm
from pallas_kernels.quant.tensor import QuantTensor
from pallas_kernels.quant.weights import quantize_input


class Mix(NamedTuple):
    """post [..., n]: weight of the sub-layer's output in each stream. comb [..., n, n]: FIRST index = old stream."""

    post: jax.Array
    comb: jax.Array


def pre(
    streams: jax.Array,
    fn: jax.Array,
    base: jax.Array,
    scale: jax.Array,
    norm_weight: jax.Array,
    *,
    iterations: int,
    eps: float,
    norm_eps: float,
    form: QuantFormat | None = None,
) -> tuple[Any, ...]:
    """x and the coefficients of `post`; and x's codes, if there is a `form` for them."""
    n = streams.shape[-2]
    mixed = _project(streams, fn, norm_eps)
    widths = jnp.array([n, n, n * n])  # of pre, post and comb
    gains = jnp.repeat(scale.astype(jnp.float32), widths, total_repeat_length=fn.shape[0])
    mixed = mixed * _per_row(gains, mixed) + _per_row(base.astype(jnp.float32), mixed)
    into = jax.nn.sigmoid(mixed[..., :n]) + eps
    out = 2 * jax.nn.sigmoid(mixed[..., n : 2 * n])
    comb = sinkhorn(mixed[..., 2 * n :].reshape(*mixed.shape[:-1], n, n), iterations, eps)
    x = rms_norm(_weighted_sum(into, streams), norm_weight, norm_eps)
    x = x.astype(streams.dtype)
    return x, Mix(out, comb), *(() if form is None else (codes_of(x, form),))


def codes_of(x: jax.Array, form: QuantFormat) -> QuantTensor:
    """Of rows x [..., D] as they come out, rounded to their dtype; without a gradient."""
    kind = jnp.finfo(x.dtype)  # compiled for a GPU, that rounding would be left out
    x = jax.lax.reduce_precision(jax.lax.stop_gradient(x), kind.nexp, kind.nmant)
    return quantize_input(x, form, None)


def sinkhorn(logits: jax.Array, iterations: int, eps: float) -> jax.Array:
    """A nearly doubly stochastic matrix: softmax over rows, columns normalised, then rows and columns in turn."""

    def normalize(comb: jax.Array, axis: int) -> jax.Array:
        return comb / (jnp.sum(comb, axis=axis, keepdims=True) + eps)

    def both(comb: jax.Array, _: None) -> tuple[jax.Array, None]:
        return normalize(normalize(comb, -1), -2), None

    comb = normalize(jax.nn.softmax(logits, axis=-1) + eps, -2)
    return jax.lax.scan(both, comb, None, length=iterations - 1)[0]


def post(streams: jax.Array, out: jax.Array, mix: Mix) -> jax.Array:
    # In full: GPUs would round both to TF32, 11 bits.
    carried = jnp.einsum("...ij,...id->...jd", mix.comb, streams.astype(jnp.float32), precision="highest")
    written = mix.post[..., None] * out.astype(jnp.float32)[..., None, :]
    return (written + carried).astype(streams.dtype)


def head(
    streams: jax.Array, fn: jax.Array, base: jax.Array, scale: jax.Array, *, eps: float, norm_eps: float
) -> jax.Array:
    mixed = _project(streams, fn, norm_eps)
    mixed = mixed * _per_row(scale.astype(jnp.float32), mixed) + _per_row(base.astype(jnp.float32), mixed)
    return _weighted_sum(jax.nn.sigmoid(mixed) + eps, streams).astype(streams.dtype)


def _project(streams: jax.Array, fn: jax.Array, norm_eps: float) -> jax.Array:
    flat = streams.astype(jnp.float32).reshape(*streams.shape[:-2], math.prod(streams.shape[-2:]))
    inverse_rms = jax.lax.rsqrt(jnp.mean(flat * flat, axis=-1, keepdims=True) + norm_eps)
    # "highest": a device that would round this small product to TF32 must not; the released code keeps it float32.
    return jnp.matmul(flat, fn.astype(jnp.float32).T, precision="highest") * inverse_rms


def _weighted_sum(weights: jax.Array, streams: jax.Array) -> jax.Array:
    return jnp.einsum("...n,...nd->...d", weights, streams.astype(jnp.float32), precision="highest")


def _per_row(vector: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.expand_dims(vector, range(like.ndim - 1))

"""The Hopper kernels as implementations of `pre` and `post`: which calls they take, and their gradients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import device
from pallas_kernels.formats import QuantFormat
from pallas_kernels.hyper_connection import reference
from pallas_kernels.hyper_connection.reference import Mix
from pallas_kernels.hyper_connection.tiling import CHUNK, LEAST_EPS, MOST_WIDTH, STREAMS, WIDTH_UNIT
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.quantize_rows.tiling import form_reason
from pallas_kernels.straight_through import straight_through


def pre_unsupported(
    streams: jax.Array,
    fn: jax.Array,
    *_: Any,
    eps: float = LEAST_EPS,
    form: QuantFormat | None = None,
    **__: Any,
) -> str | None:
    """Why the Hopper kernels do not take this call of `pre`, None if they do."""
    if reason := _streams_reason(streams) or (form_reason(form) if form else None):
        return reason
    if fn.dtype != jnp.float32:
        return f"fn is {fn.dtype}: it takes float32"
    if eps < LEAST_EPS:
        return f"eps is {eps}: it takes {LEAST_EPS} and more"
    if streams.shape[-1] % WIDTH_UNIT:
        return f"streams are {streams.shape[-1]} wide: a multiple of {WIDTH_UNIT}"
    return None


def post_unsupported(streams: jax.Array, out: jax.Array, mix: Mix) -> str | None:
    """Why the Hopper kernel does not take this call of `post`, None if it does."""
    del mix
    if reason := _streams_reason(streams):
        return reason
    if out.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the output is {out.dtype}: it takes bfloat16 and float32"
    return None


def _streams_reason(streams: jax.Array) -> str | None:
    here = device.current()
    *leading, n, width = streams.shape
    if here.capability != (9, 0) and not is_interpreted():
        return f"{here.name} is no Hopper GPU (compute capability 9.0)"
    if n != STREAMS:
        return f"there are {n} streams: it takes {STREAMS}"
    if streams.dtype != jnp.bfloat16:
        return f"streams are {streams.dtype}: it takes bfloat16"
    if 0 in leading:
        return "there are no tokens"
    if width % CHUNK or width > MOST_WIDTH:
        return f"streams are {width} wide: a multiple of {CHUNK} up to {MOST_WIDTH}"
    return None


def pre(
    streams: jax.Array,
    fn: jax.Array,
    base: jax.Array,
    scale: jax.Array,
    norm_weight: jax.Array,
    **how: Any,
) -> tuple[Any, ...]:
    """`reference.pre`, whose gradient it has too."""
    from pallas_kernels.hyper_connection import kernel_sm90  # here: who runs no kernel does not wait for Pallas

    return _differentiable(
        functools.partial(kernel_sm90.pre, **how),
        functools.partial(reference.pre, **how),
        (streams, fn, base, scale, norm_weight),
    )


def post(streams: jax.Array, out: jax.Array, mix: Mix) -> jax.Array:
    """`reference.post`, whose gradient it has too."""
    from pallas_kernels.hyper_connection import post_sm90  # here: who runs no kernel does not wait for Pallas

    return _differentiable(post_sm90.post, reference.post, (streams, out, mix))


def _differentiable(kernel: Any, smooth: Any, arguments: tuple[Any, ...]) -> Any:
    return straight_through(lambda x, _: kernel(*x), lambda x, _: smooth(*x))(arguments, None)

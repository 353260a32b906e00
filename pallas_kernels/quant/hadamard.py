"""Hadamard rotation: spreads an outlier over all channels, so that no scale has to stretch for it alone."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.formats import FormatError
from pallas_kernels.typing import typed

LARGEST_BLOCK = 1024  # channels rotated together where `rotate_blocks` may choose


@typed
def hadamard(x: Float[Array, "... width"]) -> Float[Array, "... width"]:
    """x times the Hadamard matrix (-1)^popcount(i & j) * width^-0.5, in float32, rounded once to x's dtype.

    It is its own inverse. By sums and differences of pairs, in an order of their own: as a product of matrices, a
    row's bits would depend on how many rows there are, on some CPUs.
    Raises FormatError unless the width is a power of two.
    """
    width = x.shape[-1]
    if width & (width - 1):
        raise FormatError(f"Hadamard rotation of {width} channels: the width must be a power of two")
    rotated, distance = x.astype(jnp.float32), 1
    while distance < width:
        pairs = rotated.reshape(*x.shape[:-1], -1, 2, distance)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        rotated = jnp.stack([first + second, first - second], axis=-2).reshape(x.shape)
        distance *= 2
    return (rotated * width**-0.5).astype(x.dtype)


@typed
def rotate_blocks(x: Float[Array, "... width"]) -> Float[Array, "... width"]:
    """`hadamard` over consecutive blocks: the largest power of two, up to LARGEST_BLOCK, that divides the width.

    Rotating activations and the weight's input channels alike leaves their product as it was.
    """
    width = x.shape[-1]
    block = min(width & -width, LARGEST_BLOCK)
    return hadamard(x.reshape(*x.shape[:-1], width // block, block)).reshape(x.shape)


__all__ = ["hadamard", "rotate_blocks"]

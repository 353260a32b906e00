"""Hadamard rotation: spreads an outlier over all channels, so that no scale has to stretch for it alone."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.formats import FormatError
from pallas_kernels.typing import typed

LARGEST_BLOCK = 1024  # channels rotated together where `rotate_blocks` may choose


@functools.lru_cache
def _matrix(width: int) -> np.ndarray:
    """The symmetric, orthogonal Sylvester matrix: (-1)^popcount(i & j) * width^-0.5."""
    index = np.arange(width)
    odd = np.bitwise_count(index[:, None] & index[None, :]) & 1
    return ((1.0 - 2.0 * odd) * width**-0.5).astype(np.float32)


@typed
def hadamard(x: Float[Array, "... width"]) -> Float[Array, "... width"]:
    """x times the Hadamard matrix of its width, in float32, rounded once to x's dtype. It is its own inverse.

    Raises FormatError unless the width is a power of two.
    """
    width = x.shape[-1]
    if width & (width - 1):
        raise FormatError(f"Hadamard rotation of {width} channels: the width must be a power of two")
    rotated = jnp.matmul(x.astype(jnp.float32), _matrix(width), precision="highest")
    return rotated.astype(x.dtype)


@typed
def rotate_blocks(x: Float[Array, "... width"]) -> Float[Array, "... width"]:
    """`hadamard` over consecutive blocks: the largest power of two, up to LARGEST_BLOCK, that divides the width.

    Rotating activations and the weight's input channels alike leaves their product as it was.
    """
    width = x.shape[-1]
    block = min(width & -width, LARGEST_BLOCK)
    return hadamard(x.reshape(*x.shape[:-1], width // block, block)).reshape(x.shape)


__all__ = ["hadamard", "rotate_blocks"]

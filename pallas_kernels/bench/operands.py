"""Operands that are too large for the usual way of making them."""

from __future__ import annotations

import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quant import FP8_BLOCK, MXFP4, QuantTensor

# Codes of a normal distribution, by a random byte: what quantised weights look like, and none of them is NaN.
SPREAD = 64
QUANTILES = np.array([SPREAD * statistics.NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)])
MXFP4_SPREAD = 2.93  # of the values that its codes stand for, all as likely


def weights_of(shape: tuple[int, int, int], count: int, key: jax.Array) -> tuple[QuantTensor, ...]:
    """`count` stacks of expert weights, as quantised ones of a normal distribution of about k^-1/2 look."""

    def codes(key: jax.Array) -> jax.Array:
        table = jax.lax.bitcast_convert_type(jnp.asarray(QUANTILES, jnp.float8_e4m3fn), jnp.uint8)
        return jax.lax.bitcast_convert_type(table[jax.random.bits(key, shape[1:], jnp.uint8)], jnp.float8_e4m3fn)

    def stack(key: jax.Array) -> QuantTensor:
        of_values, of_scale = jax.random.split(key)
        values = jax.lax.map(codes, jax.random.split(of_values, shape[0]))  # one expert at a time: random bits are wide
        middle = 127 - round(math.log2(SPREAD * shape[-1] ** 0.5))
        scale = jax.random.randint(of_scale, FP8_BLOCK.scale_shape(shape), middle - 1, middle + 2).astype(jnp.uint8)
        return QuantTensor(values, jax.lax.bitcast_convert_type(scale, jnp.float8_e8m0fnu), FP8_BLOCK)

    return tuple(stack(key) for key in jax.random.split(key, count))


def mxfp4_weights_of(shape: tuple[int, int, int], count: int, key: jax.Array) -> tuple[QuantTensor, ...]:
    """As `weights_of`, of codes that are all as likely."""

    def codes(key: jax.Array) -> jax.Array:
        return jax.random.bits(key, (shape[1], shape[2] // 2), jnp.uint8)

    def stack(key: jax.Array) -> QuantTensor:
        of_values, of_scale = jax.random.split(key)
        values = jax.lax.map(codes, jax.random.split(of_values, shape[0]))  # one expert at a time, as above
        middle = 127 - round(math.log2(MXFP4_SPREAD * shape[-1] ** 0.5))
        scale = middle - 1 + jax.random.bits(of_scale, MXFP4.scale_shape(shape), jnp.uint8) % 3
        return QuantTensor(values, jax.lax.bitcast_convert_type(scale, jnp.float8_e8m0fnu), MXFP4)

    return tuple(stack(key) for key in jax.random.split(key, count))

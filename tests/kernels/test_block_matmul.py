"""Dense layers: weights [out, in], plain or quantised, products summed in float32; the grouped output projection."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels import block_matmul
from pallas_kernels.quant import FP8_BLOCK, QuantTensor
from pallas_kernels.quant import dequantize as eager_dequantize

matmul = functools.partial(jax.jit, static_argnames="out_dtype")(block_matmul.matmul)
block_diagonal_matmul = jax.jit(block_matmul.block_diagonal_matmul)
dequantize = jax.jit(eager_dequantize)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def fp8(seed, out, into):
    """One tile of 128 x 128 and partial ones, each with its own scale."""
    tiles = (-(-out // 128), -(-into // 128))
    scale = np.random.default_rng(seed).integers(124, 131, tiles, np.uint8).view(ml_dtypes.float8_e8m0fnu)
    values = normal(seed + 1, out, into).astype(ml_dtypes.float8_e4m3fn)
    return QuantTensor(jax.device_put(values), jax.device_put(scale), FP8_BLOCK)


def test_quantised_weights_are_the_dequantised_ones():
    x, w = normal(0, 2, 3, 136), fp8(1, 130, 136)
    want = np.einsum("bti,oi->bto", x.astype(np.float64), np.asarray(dequantize(w), np.float64))
    np.testing.assert_allclose(matmul(x, w), want, rtol=1e-4, atol=1e-4)


def test_sums_are_float32_whatever_comes_in():
    """4096 ones and a half: a bfloat16 accumulator would lose the half, and stop at 256."""
    x, w = np.ones((1, 4097), jnp.bfloat16), np.ones((1, 4097), jnp.bfloat16)
    x[0, 0] = 0.5
    assert matmul(x, w, out_dtype=jnp.float32).tolist() == [[4096.5]]
    assert matmul(x, w).dtype == jnp.bfloat16
    assert matmul(x.astype(np.float32), w).tolist() == [[4096.5]]


def test_each_group_has_its_own_rows_of_the_weight():
    x, w = normal(0, 2, 3, 4, 8), normal(1, 4 * 5, 8)  # four groups of 8 in, 5 out
    want = np.concatenate([x[:, :, g] @ w[5 * g : 5 * g + 5].T for g in range(4)], axis=-1)
    np.testing.assert_allclose(block_diagonal_matmul(x, w), want, rtol=1e-4, atol=1e-5)
    quantised = fp8(2, 20, 8)
    np.testing.assert_allclose(
        block_diagonal_matmul(x, quantised), block_diagonal_matmul(x, dequantize(quantised)), rtol=1e-6
    )

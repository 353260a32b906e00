"""Dense layers: weights [out, in], plain or quantised, products summed in float32; the grouped output projection."""

import functools
import inspect

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import block_matmul
from pallas_kernels.quant import FORMATS, FP8_BLOCK, FP8_GROUP, QuantTensor
from tests.kernels.compiled import dequantize, quantize

matmul = functools.partial(jax.jit, static_argnames="out_dtype")(block_matmul.matmul)
block_diagonal_matmul = jax.jit(block_matmul.block_diagonal_matmul)


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


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("activations", [None, *map(FORMATS.get, ("fp8_group", "fp8_row", "int8_row", "fp8_tensor"))])
def test_no_rows(activations, batch_invariant):
    w, how = fp8(1, 64, 256), {"batch_invariant": batch_invariant, "implementation": "reference"}
    if not batch_invariant or activations is None or activations.tile[0] == 1:
        multiply = jax.jit(functools.partial(block_matmul.matmul, activations=activations, **how))
        assert multiply(jnp.zeros((2, 0, 256)), w).shape == (2, 0, 64)
    by_groups = jax.jit(functools.partial(block_matmul.block_diagonal_matmul, **how))
    assert by_groups(jnp.zeros((0, 2, 256)), w).shape == (0, 64)


def test_what_does_not_fit_is_named():
    x, w = jnp.ones((2, 3, 128)), fp8(1, 64, 128)
    for rows, columns in ((5, 128), (6, 256)):
        codes = quantize(jnp.ones((rows, columns)), FP8_GROUP)
        with pytest.raises(ValueError, match=rf"codes have shape \({rows}, {columns}\): the rows of x .* \(6, 128\)"):
            block_matmul.matmul(x, w, activations=FP8_GROUP, codes=codes)
    stack = quantize(jnp.ones((2, 64, 128)), FP8_BLOCK)
    with pytest.raises(ValueError, match=r"w has shape \(2, 64, 128\): a matrix"):
        block_matmul.matmul(x, stack)


@pytest.mark.parametrize(
    ("x", "w", "error"),
    [
        ([[1.0] * 128], None, "x is a list: a jax or NumPy array"),
        ("x", None, "x is a str"),
        (np.ones((2, 128), np.int32), None, r"x is int32: an array of floats, such as x.astype\(jnp.float32\)"),
        (np.float32(1), None, "x is a float32: a jax or NumPy array"),
        (np.ones((), np.float32), None, r"x has shape \(\): it ends in \[I\]"),
        (np.ones((2, 128), np.float32), [[1.0] * 128], "w is a list"),
        (np.ones((2, 128), np.float32), np.ones((4, 128), np.int8), "w is int8"),
    ],
)
def test_what_is_no_array_of_floats_is_named(x, w, error):
    w = fp8(1, 64, 128) if w is None else w
    with pytest.raises((TypeError, ValueError), match=error):
        inspect.unwrap(block_matmul.matmul)(x, w)
    with pytest.raises((TypeError, ValueError), match=error.replace("[I", "[G, I")):
        inspect.unwrap(block_matmul.block_diagonal_matmul)(x, w)


def test_a_product_for_each_of_several_rows_of_codes():
    """Under vmap everything has the shapes of one of them."""
    x, w = jnp.asarray(normal(0, 2, 3, 128)), fp8(1, 64, 128)

    def run(x, codes):
        return block_matmul.matmul(x, w, activations=FP8_GROUP, codes=codes)

    codes = jax.jit(jax.vmap(lambda x: quantize(x, FP8_GROUP)))(x)
    got, want = jax.jit(jax.vmap(run))(x, codes), jax.jit(run)(x, None)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

"""Weights that treat their input, weights that show it, and quantised embedding tables."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quant
from pallas_kernels.block_matmul import matmul
from pallas_kernels.formats import FORMATS, FP8_GROUP
from pallas_kernels.quant import ObservedWeight, QuantTensor, TreatedWeight, hadamard, observe, weights
from pallas_kernels.quant.weights import shown

quantize = jax.jit(quant.quantize, static_argnames="form")
dequantize = jax.jit(quant.dequantize, static_argnames="dtype")
rotate_blocks = jax.jit(hadamard.rotate_blocks)
treat = jax.jit(weights.treat, static_argnames="activations")
embedding_rows = jax.jit(weights.embedding_rows, static_argnames="dtype")
INT8_ROW, FP8_TENSOR = FORMATS["int8_row"], FORMATS["fp8_tensor"]
product = functools.partial(jax.jit, static_argnames=("activations", "implementation"))(matmul)
CHANNELS = np.array([3, 40, 95], np.int32)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def treated(w, form=None, *, channels=None, rotated=False, input_scale=None):
    """What a recipe makes of the array w [out, in]; `form` None rounds nothing."""
    columns = None
    if channels is not None:
        columns, w = w[..., channels], w.at[..., channels].set(0)
    if rotated:
        w = rotate_blocks(w)
    return TreatedWeight(w if form is None else quantize(w, form), input_scale, channels, columns, rotated)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("channels", [None, CHANNELS])
def test_treatments_change_no_product_when_nothing_is_rounded(rotated, channels):
    x, w = normal(0, 2, 3, 96), normal(1, 10, 96)
    weight = treated(w, channels=channels, rotated=rotated)
    assert weight.shape == (10, 96) and weight.ndim == 2
    assert weight.nbytes == 10 * 96 * 4 + (0 if channels is None else 3 * 4 + 10 * 3 * 4)
    np.testing.assert_allclose(product(x, weight), x @ w.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(product(x, weight, activations=FP8_GROUP), x @ w.T, rtol=1e-4, atol=1e-4)


def test_treatments_tame_outliers():
    """A channel of 300: with a scale a row, what is left of the others depends on the treatment."""
    x, w = normal(0, 64, 96).at[:, 40].set(300), normal(1, 10, 96)
    want = x @ w.T

    def error(weight):
        got = product(x, weight, activations=INT8_ROW, implementation="reference")
        return np.linalg.norm(got - want) / np.linalg.norm(want - np.outer(x[:, 40], w[:, 40]))

    plain = error(quantize(w, INT8_ROW))
    assert error(treated(w, INT8_ROW, rotated=True)) < plain / 2
    assert error(treated(w, INT8_ROW, channels=np.array([40], np.int32))) < plain / 20


def test_treating_gives_each_part_its_input():
    x = normal(0, 2, 3, 96)
    rounded, weight, kept = treat(x, treated(normal(1, 10, 96), INT8_ROW, channels=CHANNELS), INT8_ROW)
    assert isinstance(weight, QuantTensor) and kept is not None
    np.testing.assert_array_equal(kept, x[..., CHANNELS])  # exactly
    assert not np.any(rounded[..., CHANNELS]) and rounded.dtype == x.dtype and rounded.shape == x.shape
    flat = x.at[..., CHANNELS].set(0).reshape(6, 96)
    np.testing.assert_array_equal(rounded.reshape(6, 96), dequantize(quantize(flat, INT8_ROW)))


def test_input_is_rounded_for_quantised_weights_only():
    x = normal(0, 4, 96)
    for w in (normal(1, 10, 96), treated(normal(1, 10, 96))):
        np.testing.assert_array_equal(treat(x, w, INT8_ROW)[0], x)
    np.testing.assert_array_equal(treat(x, quantize(normal(1, 10, 96), INT8_ROW), None)[0], x)


def test_tiles_are_no_wider_than_the_input():
    x, w = normal(0, 4, 96), quantize(normal(1, 10, 96), FORMATS["fp8"])
    rounded = np.asarray(treat(x, w, FP8_GROUP)[0])
    np.testing.assert_array_equal(rounded, dequantize(quantize(jnp.pad(x, ((0, 0), (0, 32))), FP8_GROUP))[:, :96])


def test_a_static_scale_saturates():
    x = jnp.zeros((2, 96)).at[0, :4].set(jnp.array([1e6, -1e6, 448 * 0.5, 3.0]))
    weight = treated(normal(1, 10, 96), FP8_TENSOR, input_scale=jnp.full((1, 1), 0.5))
    rounded = np.asarray(treat(x, weight, FP8_TENSOR)[0])
    np.testing.assert_array_equal(rounded[0, :4], [224, -224, 224, 3])
    np.testing.assert_array_equal(treat(x, weight, FORMATS["fp8_row"])[0], rounded)  # whatever the tile
    want = rounded.astype(np.float64) @ np.asarray(dequantize(weight.weight), np.float64).T
    np.testing.assert_allclose(
        product(x, weight, activations=FP8_TENSOR, implementation="reference"), want, rtol=1e-5, atol=1e-3
    )


def test_an_observed_weight_multiplies_as_ever_and_shows_its_input():
    x, w = normal(0, 2, 3, 96), treated(normal(1, 10, 96), INT8_ROW, rotated=True)

    @jax.jit
    def traced(x, w):
        with observe() as seen:
            out = matmul(matmul(x, ObservedWeight(w, "first")), ObservedWeight(jnp.ones((4, 10)), "second"))
        return out, dict(seen)

    out, seen = traced(x, w)
    hidden = product(x, w)
    assert sorted(seen) == ["first", "second"]
    np.testing.assert_array_equal(seen["first"], x)  # before any treatment
    np.testing.assert_allclose(seen["second"], hidden, rtol=1e-6)
    np.testing.assert_allclose(out, hidden @ jnp.ones((10, 4)), rtol=1e-5)
    observed = ObservedWeight(w, "first")
    assert observed.shape == (10, 96) and observed.ndim == 2
    assert jax.tree.structure(observed) != jax.tree.structure(ObservedWeight(w, "other"))  # names are static


def test_nobody_observes_after_the_block_even_if_it_fails():
    with pytest.raises(ZeroDivisionError), observe() as seen:
        _ = 1 / 0
    assert shown(jnp.ones(3), ObservedWeight("w", "name")) == "w" and seen == []


def test_observers_may_be_nested():
    x, w = jnp.ones(3), ObservedWeight(jnp.ones((2, 3)), "name")
    with observe() as outer:
        with observe() as inner:
            shown(x, w)
        shown(x, w)
    assert (len(outer), len(inner)) == (2, 1)


def equals_indexing(table, ids, dtype):
    whole = dequantize(table, dtype) if isinstance(table, QuantTensor) else table.astype(dtype)
    got = embedding_rows(table, ids, dtype=dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(whole[ids], np.float32))


IDS = np.array([[0, 127, 128], [199, 5, 5]], np.int32)


@pytest.mark.parametrize("name, dtype", [(name, jnp.float32) for name in ["plain", *FORMATS]] + [("fp8", jnp.bfloat16)])
def test_embedding_rows_are_those_of_the_dequantised_table(name, dtype):
    table = normal(0, 200, 256) * np.exp2(np.arange(200, dtype=np.float32) // 16)[:, None]
    equals_indexing(table if name == "plain" else quantize(table, FORMATS[name]), IDS, dtype)


@pytest.mark.parametrize("name", ["fp8", "e5m2"])
def test_embedding_rows_of_partial_tiles(name):
    equals_indexing(quantize(normal(0, 200, 192), FORMATS[name]), IDS, jnp.float32)

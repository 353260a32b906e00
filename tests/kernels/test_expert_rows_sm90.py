"""Rows on their way to experts and back: quantised where their blocks lie, and added by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul.combine_sm90 import combine
from pallas_kernels.grouped_matmul.rows_sm90 import arranged, quantized_rows
from pallas_kernels.mosaic import interpreted
from pallas_kernels.mosaic.scales import scale_bytes
from pallas_kernels.quant import FP8_GROUP, QuantFormat
from tests.kernels.compiled import quantize

FLOAT_GROUP = QuantFormat("e4m3", (1, 128), "float32", floor=1e-4)
PLACED = np.array([2, 0, 5, 5, 5, 5, 5, 5, 1, 2, 4, 0, 5, 5, 5, 5], np.int32)  # 5: padding, of 5 tokens


@pytest.mark.parametrize("k", [512, 1024])
@pytest.mark.parametrize("form", [FP8_GROUP, FLOAT_GROUP], ids=["ue8m0", "float32"])
@pytest.mark.parametrize(("gathered", "folded"), [(True, True), (False, True), (True, False)])
def test_rows_are_quantised_where_their_blocks_lie(k, form, gathered, folded):
    """Bit for bit as `quantize` has them; a row of NaN stays alone, and padding that is NaN is not read."""
    rows, tokens = 8, 5
    rng = np.random.default_rng(k)
    source = rng.normal(size=(tokens, k)) * np.exp2(rng.integers(-20, 20, (tokens, 1)))
    source[4, 7] = np.nan
    real = tokens > PLACED
    x = source if gathered else np.where(real[:, None], source[np.minimum(PLACED, tokens - 1)], np.nan)
    with interpreted():
        codes, scale = quantized_rows(
            jnp.asarray(x, jnp.bfloat16), jnp.asarray(PLACED), tokens, form, rows=rows, gathered=gathered, folded=folded
        )
        codes, scale = np.asarray(codes), np.asarray(scale)
    want = quantize(jnp.asarray(source[np.minimum(PLACED, tokens - 1)], jnp.bfloat16), form)
    want = arranged(want.values, scale_bytes(want.scale), rows, folded=folded)
    want_codes, want_scale = (np.asarray(found) for found in want)
    np.testing.assert_array_equal(codes[real].view(np.uint8), want_codes[real].view(np.uint8))
    for row in np.flatnonzero(real):
        of_row = row // rows, slice(None), row % rows
        np.testing.assert_array_equal(scale[of_row], want_scale[of_row])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("width", [128, 1152])
def test_rows_of_a_token_are_added_in_order(width, dtype):
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(24, width)), dtype).at[20:].set(jnp.nan)
    place = rng.permutation(20)[:9].reshape(3, 3).astype(np.int32)
    with interpreted():
        got = np.asarray(combine(rows, jnp.asarray(place)))
    found = np.asarray(rows, np.float32)[place]
    np.testing.assert_array_equal(got, np.asarray(found[:, 0] + found[:, 1] + found[:, 2]).astype(dtype))


def test_lowers_for_a_gpu():
    shape = jax.ShapeDtypeStruct
    x, token = shape((4096, 4096), jnp.bfloat16), shape((57344,), jnp.int32)
    for folded in (True, False):
        how = {"rows": 112, "gathered": True, "folded": folded}
        quantised = jax.jit(functools.partial(quantized_rows, tokens=4096, form=FP8_GROUP, **how))
        quantised.trace(x, token).lower(lowering_platforms=("cuda",))
    added = jax.jit(combine).trace(shape((57344, 4096), jnp.bfloat16), shape((4096, 6), jnp.int32))
    added.lower(lowering_platforms=("cuda",))

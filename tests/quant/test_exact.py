"""MXFP4 to FP8 blocks: the same values to the bit, or a refusal that says where and why."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import quant
from pallas_kernels.formats import FP8_BLOCK, MXFP4
from pallas_kernels.quant import QuantTensor, mxfp4_to_fp8

dequantize, quantize = jax.jit(quant.dequantize), jax.jit(quant.quantize, static_argnames="form")


def mxfp4(codes, scales):
    """codes [..., out, in] of E2M1, scales [..., out, in / 32] of E8M0, both uint8."""
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    return QuantTensor(jnp.asarray(packed), jnp.asarray(scales.view(ml_dtypes.float8_e8m0fnu)), MXFP4)


def random_mxfp4(seed, shape, scales=(120, 124)):
    rng = np.random.default_rng(seed)
    groups = (*shape[:-1], shape[-1] // 32)
    return mxfp4(rng.integers(0, 16, shape, np.uint8), rng.integers(*scales, groups, np.uint8, endpoint=True))


def same_values(x):
    converted = mxfp4_to_fp8(x)
    assert converted.validate() == [] and converted.format is FP8_BLOCK and converted.shape == x.shape
    want, got = np.asarray(dequantize(x)), np.asarray(dequantize(converted))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_array_equal(got.view(np.uint32)[~np.isnan(want)], want.view(np.uint32)[~np.isnan(want)])
    return converted


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (200, 192), (5, 32), (130, 160)])
def test_exact_partial_tiles_included(shape):
    converted = same_values(random_mxfp4(0, shape))
    assert converted.scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))


def test_stacked_experts_are_converted_one_by_one():
    x = random_mxfp4(0, (2, 3, 140, 160))
    converted = same_values(x)
    alone = mxfp4_to_fp8(jax.tree.map(lambda leaf: leaf[1, 2], x))
    for name in ("values", "scale"):
        np.testing.assert_array_equal(np.asarray(getattr(converted, name))[1, 2], np.asarray(getattr(alone, name)))


def test_it_is_what_quantising_gives_where_that_is_exact():
    """The scale is the least for the largest value, as everywhere (above the floor of FP8_BLOCK)."""
    x = random_mxfp4(1, (256, 256))
    converted, quantised = mxfp4_to_fp8(x), quantize(dequantize(x), FP8_BLOCK)
    for name in ("values", "scale"):
        np.testing.assert_array_equal(
            np.asarray(getattr(converted, name)).view(np.uint8), np.asarray(getattr(quantised, name)).view(np.uint8)
        )


def one_small_one_large(small_code, large_code, spread):
    """A tile whose only values are `small_code` under the scale 1 and `large_code` under 2^spread."""
    codes, scales = np.zeros((128, 128), np.uint8), np.full((128, 4), 127, np.uint8)
    codes[3, 5], codes[100, 90], scales[100, 2] = small_code, large_code, 127 + spread
    return mxfp4(codes, scales)


# Codes 1 to 7 are 0.5, 1, 1.5, 2, 3, 4, 6: each 1 or 3 times a power of two. E4M3's smallest step is 2^-9, and its
# largest codes of this kind are 256 and 384: powers may be 17 apart, or 16 if the large value has the factor 3.
WIDEST = {(1, 1): 17, (1, 2): 16, (1, 4): 15, (1, 6): 14, (1, 7): 14, (3, 7): 14, (2, 7): 15, (5, 7): 15, (7, 7): 16}


@pytest.mark.parametrize("small, large", WIDEST)
def test_the_widest_spread_that_is_exact_and_the_next_that_is_not(small, large):
    widest = WIDEST[small, large]
    for signs in (0, 8):
        same_values(one_small_one_large(small | signs, large, widest))
        same_values(one_small_one_large(small, large | signs, -3))
        with pytest.raises(ValueError, match=rf"scales go from 2\^0 to 2\^{widest + 1}"):
            mxfp4_to_fp8(one_small_one_large(small | signs, large, widest + 1))


def test_refusal_names_tensor_expert_tile_reason_and_remedy():
    x = random_mxfp4(0, (2, 200, 320))
    scales = np.array(x.scale).view(np.uint8)
    scales[1, 150, 9] = 90  # tile (1, 2), which is partial at both edges
    x = QuantTensor(x.values, jnp.asarray(scales.view(ml_dtypes.float8_e8m0fnu)), MXFP4)
    with pytest.raises(ValueError) as refused:
        mxfp4_to_fp8(x, "layers.7.ffn.experts.w1")
    message = str(refused.value)
    assert "layers.7.ffn.experts.w1[1]: tile (1, 2), rows 128..199 and columns 256..319" in message
    assert "0 of the other 5" in message and "from 2^-37 to 2^-3" in message
    assert "Keep MXFP4" in message and "requantise" in message


def test_scales_of_zero_groups_do_not_matter():
    x = random_mxfp4(0, (128, 128))
    packed, scales = np.array(x.values), np.array(x.scale).view(np.uint8)
    packed[7, 16:32], scales[7, 1] = 0x80, 250  # zeros of both signs
    packed[9, 0:16], scales[9, 0] = 0x08, 0
    same_values(QuantTensor(jnp.asarray(packed), jnp.asarray(scales.view(ml_dtypes.float8_e8m0fnu)), MXFP4))


def test_tiles_of_zeros_have_the_scale_one():
    x = mxfp4(np.zeros((130, 160), np.uint8), np.full((130, 5), 3, np.uint8))
    converted = same_values(x)
    assert np.all(np.asarray(converted.scale).astype(np.float32) == 1) and not np.any(np.asarray(converted.values))


def test_nan_groups_stay_nan_and_set_no_scale():
    x = random_mxfp4(0, (128, 128))
    scales = np.array(x.scale).view(np.uint8)
    scales[5, 2] = 255
    with_nan = QuantTensor(x.values, jnp.asarray(scales.view(ml_dtypes.float8_e8m0fnu)), MXFP4)
    converted = same_values(with_nan)
    assert np.isnan(np.asarray(dequantize(converted))).sum() == 32


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), low=st.integers(0, 254), spread=st.integers(0, 16))
def test_exact_or_refused_over_the_whole_range_of_scales(seed, low, spread):
    """Refused only if no other scale would do: tried with all of them."""
    x = random_mxfp4(seed, (4, 64), (low, min(low + spread, 254)))
    try:
        same_values(x)
    except ValueError:
        want, scales = np.asarray(dequantize(x), np.float64), np.exp2(np.arange(255.0) - 127)
        with np.errstate(over="ignore"):
            codes = np.clip(want / scales[:, None, None], -448, 448).astype(ml_dtypes.float8_e4m3fn)
        exact = codes.astype(np.float64) * scales[:, None, None] == want
        assert not exact.all(axis=(1, 2)).any()


def test_other_formats_are_refused_by_name():
    w = quantize(jnp.ones((4, 128)), FP8_BLOCK)
    with pytest.raises(ValueError, match="gate is e4m3:128x128:ue8m0, not e2m1:1x32:ue8m0"):
        mxfp4_to_fp8(w, "gate")
    broken = QuantTensor(jnp.zeros((4, 64), jnp.uint8), w.scale, MXFP4)
    with pytest.raises(ValueError, match=r"scale has shape \(1, 1\)"):
        mxfp4_to_fp8(broken)

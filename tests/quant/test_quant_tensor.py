"""QuantTensor and dequantize against the recorded vectors and against exact arithmetic over every code."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.quant import FP8_BLOCK, FP8_GROUP, MXFP4, QuantTensor, dequantize, round_trip

ORACLE = Path(__file__).parents[1] / "oracle"
VECTORS = np.load(ORACLE / "quant_vectors.npz")
E4M3, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
compiled = jax.jit(dequantize)
ALL_SCALES = np.arange(256, dtype=np.uint8)


def reference():
    """The numpy code that made the vectors."""
    spec = importlib.util.spec_from_file_location("quant_ref", ORACLE / "quant_ref.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def quant_tensor(values, scale, fmt):
    """From numpy codes, through the device, as a checkpoint would bring it."""
    return QuantTensor(jax.device_put(values.view(fmt.values_dtype)), jax.device_put(scale.view(E8M0)), fmt)


def same_bits(actual, expected):
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    good = ~np.isnan(expected)
    np.testing.assert_array_equal(actual.view(np.uint32)[good], expected.view(np.uint32)[good])


def exact_products(element_values):
    """[256 scales, elements] float32 of value * 2^(code - 127); float64 holds each product exactly."""
    scales = np.where(ALL_SCALES == 255, np.nan, np.exp2(ALL_SCALES.astype(np.float64) - 127))
    with np.errstate(over="ignore"):
        return (scales[:, None] * element_values.astype(np.float64)).astype(np.float32)


def test_fp8_blocks_match_the_vectors_partial_edges_included():
    x = quant_tensor(VECTORS["w8_codes"], VECTORS["w8_scale"], FP8_BLOCK)
    assert (x.shape, x.ndim, x.size, x.nbytes) == ((200, 192), 2, 200 * 192, 200 * 192 + 4)
    same_bits(compiled(x), VECTORS["w8_dequant"])


def test_mxfp4_packing_matches_the_vectors():
    ref = reference()
    x = quant_tensor(VECTORS["lin4_w_packed"], VECTORS["lin4_w_scale"], MXFP4)
    assert (x.shape, x.size, x.nbytes) == ((96, 256), 96 * 256, 96 * 128 + 96 * 8)
    activations = ref.act_dequant(*ref.act_quant(ref.from_bf16(VECTORS["lin4_x_bf16"]))).astype(np.float64)
    y = activations @ np.asarray(compiled(x), np.float64).T
    np.testing.assert_array_equal(y.astype(np.float32), VECTORS["lin4_y"])


@pytest.mark.parametrize("decode", [dequantize, compiled])
def test_every_e4m3_code_times_every_scale(decode):
    """Subnormal results (which XLA would flush), overflow to inf, both NaN encodings, signed zeros."""
    values = np.zeros((256, 128, 256), np.uint8)  # one expert a scale code; 256 columns are two tiles
    values[:, 0] = np.arange(256, dtype=np.uint8)
    x = quant_tensor(values, np.repeat(ALL_SCALES[:, None, None], 2, axis=2), FP8_BLOCK)
    same_bits(decode(x)[:, 0], exact_products(VECTORS["e4m3_values"]))


def test_every_e2m1_code_times_every_scale():
    packed = (np.arange(0, 16, 2) | np.arange(1, 16, 2) << 4).astype(np.uint8)  # codes 0..15 in order
    x = quant_tensor(np.tile(packed, (256, 2)), ALL_SCALES[:, None], MXFP4)
    same_bits(compiled(x), exact_products(np.tile(VECTORS["e2m1_values"], 2)))


def test_leading_axes_are_independent_tensors():
    rng = np.random.default_rng(0)
    values, scale = rng.integers(0, 256, (3, 5, 48), np.uint8), rng.integers(100, 140, (3, 5, 3), np.uint8)
    stacked = quant_tensor(values, scale, MXFP4)
    assert stacked.validate() == [] and stacked.shape == (3, 5, 96)
    whole = compiled(stacked)
    for e in range(3):
        same_bits(whole[e], compiled(quant_tensor(values[e], scale[e], MXFP4)))


def test_cast_to_bfloat16_is_exact():
    """Both formats have at most four significant bits, bfloat16 has eight."""
    x = quant_tensor(VECTORS["w8_codes"], VECTORS["w8_scale"], FP8_BLOCK)
    low = jax.jit(dequantize, static_argnums=1)(x, jnp.bfloat16)
    assert low.dtype == jnp.bfloat16
    same_bits(low.astype(jnp.float32), VECTORS["w8_dequant"])


def test_is_a_pytree_with_static_format():
    x = quant_tensor(VECTORS["lin4_w_packed"], VECTORS["lin4_w_scale"], MXFP4)
    moved = jax.jit(lambda t: jax.tree.map(lambda leaf: leaf[:7], t))(x)
    assert moved.format is MXFP4 and moved.shape == (7, 256) and moved.scale.dtype == E8M0
    np.testing.assert_array_equal(np.asarray(moved.scale).view(np.uint8), VECTORS["lin4_w_scale"][:7])
    abstract = jax.eval_shape(lambda: x)
    assert abstract.validate() == [] and abstract.nbytes == x.nbytes
    names = [jax.tree_util.keystr(path, simple=True) for path, _ in jax.tree.leaves_with_path(x)]
    assert names == ["values", "scale"]


def test_validate_lists_everything_wrong_and_dequantize_refuses():
    x = QuantTensor(jnp.zeros((4, 32), jnp.int8), jnp.zeros((4, 3), jnp.float32), MXFP4)
    problems = x.validate()
    assert len(problems) == 3
    assert "int8" in problems[0] and "float32" in problems[1] and "(4, 2)" in problems[2]
    with pytest.raises(ValueError, match="not a e2m1:1x32:ue8m0 tensor: values are int8"):
        dequantize(x)
    with pytest.raises(ValueError, match="multiple of 2"):
        MXFP4.values_shape((4, 33))


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
def test_no_compiler_can_leave_the_rounding_out(element):
    """XLA for GPUs drops a cast to FP8 that a cast back follows, and the rounding with it: codes are never cast."""
    form = dataclasses.replace(FP8_GROUP, element=element)
    text = jax.jit(lambda x: round_trip(x, form)).lower(jnp.ones((4, 128))).as_text()
    of_codes = [line for line in text.splitlines() if "(tensor<4x128xf8" in line]
    assert of_codes and all("bitcast_convert" in line for line in of_codes)

"""Casts against recorded vectors, bit for bit: activations, FP4, weights; midpoints, clamps, subnormals."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import quant
from pallas_kernels.formats import ELEMENTS, FP8_BLOCK, FP8_ENTRY, FP8_GROUP, MXFP4
from pallas_kernels.quant import QuantTensor, elements

quantize = jax.jit(quant.quantize, static_argnames="form")
dequantize = jax.jit(quant.dequantize, static_argnames="dtype")
encode = jax.jit(elements.encode, static_argnames="element")
decode = jax.jit(elements.decode, static_argnames="element")
BF16 = ml_dtypes.bfloat16
CASES = [("act128", FP8_GROUP), ("act64", FP8_ENTRY), ("fp4", MXFP4)]


def equal_bits(got, want):
    """`want` are codes or bit patterns as the vectors keep them."""
    np.testing.assert_array_equal(np.asarray(got).view(want.dtype), want)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("rows", ["edge", "rand"])
@pytest.mark.parametrize("name, form", CASES)
def test_rows_to_codes_scales_and_back(vectors, name, form, rows, dtype):
    prefix = f"{name}_{rows}_"
    x = vectors[prefix + "x_bf16"].view(BF16).astype(dtype)
    q = quantize(x, form)
    equal_bits(q.values, vectors[prefix + ("packed" if form is MXFP4 else "codes")])
    equal_bits(q.scale, vectors[prefix + "scale"])
    equal_bits(dequantize(q, jnp.bfloat16), vectors[prefix + "dequant_bf16"])


def test_nibbles_pair_neighbouring_columns(vectors):
    for rows in ("edge", "rand"):
        codes, packed = vectors[f"fp4_{rows}_codes"], vectors[f"fp4_{rows}_packed"]
        equal_bits(elements.pack_nibbles(jnp.asarray(codes)), packed)
        equal_bits(elements.unpack_nibbles(jnp.asarray(packed)), codes)


def test_e4m3_midpoints_go_to_even(vectors):
    midpoints, codes = vectors["e4m3_midpoints"], vectors["e4m3_midpoint_codes"]
    equal_bits(encode(midpoints, "e4m3"), codes)
    equal_bits(encode(-midpoints, "e4m3"), codes | 0x80)


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
def test_one_step_of_float32_beside_a_midpoint_decides(element):
    """A cast by way of float16 or bfloat16 rounds twice: it sees a tie where there is none."""
    kind = ELEMENTS[element]
    dtype = np.dtype(kind.dtype)
    every = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    grid = np.unique(every[np.isfinite(every)])
    middle = ((grid[1:].astype(np.float64) + grid[:-1]) / 2).astype(np.float32)
    above, below = np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))
    np.testing.assert_array_equal(np.asarray(encode(above, element)).astype(np.float32), grid[1:])
    np.testing.assert_array_equal(np.asarray(encode(below, element)).astype(np.float32), grid[:-1])
    ends = np.float32([kind.largest * 1.5, -kind.largest * 1.5, 3.4e38, -3.4e38])
    np.testing.assert_array_equal(np.asarray(encode(ends, element)).astype(np.float32), np.sign(ends) * kind.largest)


def test_e2m1_ties_go_to_even_and_the_other_coding_is_read(vectors):
    x, codes = vectors["e2m1_in"], vectors["e2m1_codes"]
    equal_bits(elements.unpack_nibbles(encode(x, "e2m1")), codes)
    for written in (codes, vectors["e2m1_codes_ties_down"]):
        bits = decode(elements.pack_nibbles(jnp.asarray(written)), "e2m1")
        equal_bits(bits, vectors["e2m1_values"][written].view(np.uint32))


@pytest.mark.parametrize("recorded, form", [("scale_code_448", FP8_GROUP), ("scale_code_6", MXFP4)])
def test_scale_is_amax_rounded_up_to_a_power_of_two(vectors, recorded, form):
    amax = vectors["scale_amax"]
    x = np.zeros((len(amax), form.tile[1]), np.float32)
    x[:, 3], x[:, 5] = -amax, amax / 2
    equal_bits(quantize(x, form).scale, vectors[recorded][:, None])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_weight_blocks_with_partial_edges_and_a_block_of_zeros(vectors, dtype):
    w = vectors["w8_in_bf16"].view(BF16).astype(dtype)
    q = quantize(w, FP8_BLOCK)
    equal_bits(q.values, vectors["w8_codes"])
    equal_bits(q.scale, vectors["w8_scale"])
    equal_bits(dequantize(q), vectors["w8_dequant"].view(np.uint32))


def test_experts_are_quantised_one_by_one(vectors):
    w = vectors["w8_in_bf16"].view(BF16)
    stacked = quantize(np.stack([w, w[::-1]]), FP8_BLOCK)
    equal_bits(stacked.values[0], vectors["w8_codes"])
    alone = quantize(w[::-1].copy(), FP8_BLOCK)
    equal_bits(stacked.scale[1], np.asarray(alone.scale).view(np.uint8))


@pytest.mark.parametrize("name, form", [("lin8", FP8_BLOCK), ("lin4", MXFP4)])
def test_products_of_quantised_operands(vectors, name, form):
    """Exact sums: only the casts of both operands can make them differ."""
    values, scale = vectors["lin8_w_codes" if name == "lin8" else "lin4_w_packed"], vectors[f"{name}_w_scale"]
    w = QuantTensor(jnp.asarray(values.view(form.values_dtype)), jnp.asarray(scale.view(form.scale_dtype)), form)
    x = dequantize(quantize(vectors[f"{name}_x_bf16"].view(BF16), FP8_GROUP))
    y = np.asarray(x, np.float64) @ np.asarray(dequantize(w), np.float64).T
    np.testing.assert_array_equal(y.astype(np.float32), vectors[f"{name}_y"])

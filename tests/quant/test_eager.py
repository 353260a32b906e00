"""Compiled, fused or op by op: the bits are the same. XLA turns divisions by a constant into products, for one."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.formats import FORMATS, QuantFormat
from pallas_kernels.quant import dequantize, encode_rows, quantize
from pallas_kernels.quant.pages import pack_pages, unpack_pages
from pallas_kernels.quant.rows import decode_rows
from pallas_kernels.row_format import entry_format, index_format

# One of every element, tile and scale type: the others differ in sizes only.
FORMS = [FORMATS[name] for name in ("fp8", "fp4", "e5m2_group", "fp8_row", "int8_tensor")]
FORMS.append(QuantFormat("e4m3", (1, None), "bfloat16"))


@pytest.fixture(scope="module")
def rows(vectors):
    """Every edge case of FP8 and FP4, and scales over the whole range, in one shape for all tests."""
    rng = np.random.default_rng(0)
    spread = rng.standard_normal((36, 128)) * np.exp2(rng.integers(-120, 120, (36, 1)))
    edges = [vectors["act128_edge_x_bf16"], np.tile(vectors["fp4_edge_x_bf16"], 4)]
    x = [bits.view(ml_dtypes.bfloat16).astype(np.float32) for bits in edges] + [spread.astype(np.float32)]
    return jnp.asarray(np.concatenate(x))


def there_and_back(x, form):
    q = quantize(x, form)
    return q, dequantize(q), dequantize(q, jnp.bfloat16)


def as_pages(x, form):
    pages = pack_pages(encode_rows(x, form), 4)
    return pages, decode_rows(unpack_pages(pages, form, x.shape[-1], 4), x.dtype)


def same_bits_compiled(function, x):
    for eager, compiled in zip(jax.tree.leaves(function(x)), jax.tree.leaves(jax.jit(function)(x)), strict=True):
        np.testing.assert_array_equal(np.asarray(eager).view(np.uint8), np.asarray(compiled).view(np.uint8))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_casts(rows, form):
    same_bits_compiled(functools.partial(there_and_back, form=form), rows)


@pytest.mark.parametrize("form", [entry_format("fp8", 64), index_format("fp4")], ids=["entry", "index"])
def test_pages(rows, form):
    same_bits_compiled(functools.partial(as_pages, form=form), rows[:16])

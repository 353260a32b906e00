"""FP8 entries and the interchange page against recorded bytes, both ways."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import quant
from pallas_kernels.quant import Rows, pages
from pallas_kernels.row_format import entry_format

encode_rows = jax.jit(quant.encode_rows, static_argnames="form")
decode_rows = jax.jit(quant.decode_rows, static_argnames="dtype")
as_cached = jax.jit(quant.as_cached, static_argnames="form")
pack_pages = jax.jit(pages.pack_pages, static_argnames="page_size")
unpack_pages = jax.jit(pages.unpack_pages, static_argnames=("form", "width", "page_size"))
page_bytes = pages.page_bytes
BF16 = ml_dtypes.bfloat16
FP8 = entry_format("fp8", 64)


def bits(x):
    return np.asarray(x).view(np.uint16)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_entries(vectors, dtype):
    x = vectors["kv_bf16"].view(BF16).astype(dtype)
    rows = encode_rows(x, FP8)
    np.testing.assert_array_equal(np.asarray(rows.body).view(np.uint8), vectors["kv_codes"])
    np.testing.assert_array_equal(rows.scale[:, :7], vectors["kv_scale"])
    assert not np.any(rows.scale[:, 7]) and rows.shape == (69, 512) and rows.nbytes == 69 * 584
    np.testing.assert_array_equal(bits(rows.tail), vectors["kv_bf16"][:, 448:])
    decoded = decode_rows(rows, jnp.bfloat16)
    np.testing.assert_array_equal(bits(decoded), vectors["kv_dequant_bf16"])
    np.testing.assert_array_equal(bits(as_cached(x, FP8).astype(jnp.bfloat16)), vectors["kv_dequant_bf16"])


@pytest.mark.parametrize("page_size, count", [(64, 69), (2, 5)])
def test_pages_are_written_byte_for_byte(vectors, page_size, count):
    x = vectors["kv_bf16"][:count].view(BF16)
    written = pack_pages(encode_rows(x, FP8), page_size)
    want = vectors[f"kv_pages_{page_size}"]
    assert page_bytes(FP8, 512, page_size) == want.shape[-1] and want.shape[-1] % 576 == 0
    np.testing.assert_array_equal(written, want)


@pytest.mark.parametrize("recorded, page_size, count", [("kv_pages_64", 64, 69), ("kv_pages_2", 2, 5)])
def test_pages_are_read(vectors, recorded, page_size, count):
    rows = unpack_pages(vectors[recorded], FP8, 512, page_size)
    assert rows.shape == (len(vectors[recorded]) * page_size, 512)
    decoded = bits(decode_rows(rows, jnp.bfloat16))
    np.testing.assert_array_equal(decoded[:count], vectors["kv_dequant_bf16"][:count])
    assert not decoded[count:].any()


def test_pages_written_with_the_other_clamp_are_read(vectors, reference):
    """Writers that clamp the scale, not amax: other codes for small tiles, the same meaning of bytes."""
    written = vectors["kv_pages_2_scale_rule"]
    rows = unpack_pages(written, FP8, 512, 2)
    np.testing.assert_array_equal(bits(decode_rows(rows, jnp.bfloat16)), reference.kv_unpack(written, 2))
    ours = encode_rows(vectors["kv_bf16"][:6].view(BF16), FP8)
    assert rows.scale[5, 2] > ours.scale[5, 2]  # the entry made to differ


def test_bytes_that_mean_nothing_are_not_read(vectors):
    dirty = vectors["kv_pages_64"].copy()
    dirty[:, 64 * 584 :] = 0xFF
    dirty[:, 64 * 576 : 64 * 584].reshape(2, 64, 8)[..., 7] = 0xFF
    rows = unpack_pages(dirty, FP8, 512, 64)
    np.testing.assert_array_equal(bits(decode_rows(rows, jnp.bfloat16))[:69], vectors["kv_dequant_bf16"])


def test_unpacking_undoes_packing_with_leading_axes_and_other_widths():
    """K=48, R=16: half a tile of 64; 3 sequences; the last page half full."""
    form = entry_format("fp8", 16)
    x = jax.random.normal(jax.random.key(0), (3, 5, 48), jnp.bfloat16)
    rows = encode_rows(x, form)
    written = pack_pages(rows, 2)
    assert written.shape == (3, 3, page_bytes(form, 48, 2)) and page_bytes(form, 48, 2) == 192  # 2 x 72, to 64s
    back = unpack_pages(written, form, 48, 2)
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(rows), strict=True):
        np.testing.assert_array_equal(np.asarray(got)[:, :5].view(np.uint8), np.asarray(want).view(np.uint8))
        assert got.shape[1] == 6 and not np.any(np.asarray(got)[:, 5].astype(np.float32))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "fp8_tensor"])
def test_every_entry_format_has_pages(kind):
    form = entry_format(kind, 16)
    rows = encode_rows(jax.random.normal(jax.random.key(1), (4, 48)), form)
    written = pack_pages(rows, 2)
    assert written.shape == (2, page_bytes(form, 48, 2)) and page_bytes(form, 48, 2) == 2 * form.nbytes(48)
    back = unpack_pages(written, form, 48, 2)
    assert isinstance(back, Rows)
    jax.tree.map(np.testing.assert_array_equal, back, rows)


def test_pages_of_another_size_are_refused_by_number():
    with pytest.raises(ValueError, match="uint8 of 1700 bytes: 2 rows of 512 channels take 1728"):
        unpack_pages(jnp.zeros((3, 1700), jnp.uint8), FP8, 512, 2)
    with pytest.raises(ValueError, match="int8"):
        unpack_pages(jnp.zeros((3, 1728), jnp.int8), FP8, 512, 2)

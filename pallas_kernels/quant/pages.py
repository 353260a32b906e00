"""The interchange page and the index page: rows of a cache as the bytes other kernels read.

Both are block-planar: first every row's data, then every row's scales. The interchange page of P entries:

| offset | bytes | dtype | what |
|---|---|---|---|
| 0 | P x (K-R + 2R) | uint8 | per entry K-R E4M3 codes, then R little-endian bfloat16 rotary channels |
| P x (K+R) | P x 8 | uint8 | per entry one UE8M0 byte a tile of 64, padded to a multiple of 8 |
| P x (K+R+8) | to a multiple of K+R | uint8 | nothing |

K=512, R=64: 576 data bytes an entry, pages padded to a multiple of 576. The index page of P keys: P x (codes), then
P x (one float32, or for FP4 Ki/32 UE8M0 bytes), without padding.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from pallas_kernels.quant.rows import Rows
from pallas_kernels.row_format import RowFormat


def page_bytes(form: RowFormat, width: int, page_size: int) -> int:
    """Bytes of a page of `page_size` rows."""
    data, scales = page_layout(form, width)
    whole = page_size * (data + scales)
    return -(-whole // data) * data if form.tail else whole


def pack_pages(rows: Rows, page_size: int) -> UInt8[Array, "... pages bytes"]:
    """Rows [..., N, width] as consecutive pages; bytes that mean nothing are 0. N is filled up to whole pages."""
    *leading, count, width = rows.shape
    pages = -(-count // page_size)
    data = [_bytes(part) for part in (rows.body, rows.tail) if part is not None]
    planes = [jnp.concatenate(data, axis=-1)] + ([] if rows.scale is None else [_bytes(rows.scale)])
    missing = pages * page_size - count

    def plane(x: jax.Array) -> jax.Array:
        filled = jnp.pad(x, [(0, 0)] * len(leading) + [(0, missing), (0, 0)])
        return filled.reshape(*leading, pages, page_size * x.shape[-1])

    packed = jnp.concatenate([plane(x) for x in planes], axis=-1)
    rest = page_bytes(rows.format, width, page_size) - packed.shape[-1]
    return jnp.pad(packed, [(0, 0)] * (packed.ndim - 1) + [(0, rest)])


def unpack_pages(pages: UInt8[Array, "... pages bytes"], form: RowFormat, width: int, page_size: int) -> Rows:
    """The rows [..., pages * page_size, width] of pages. Raises ValueError for pages of another size."""
    expected = page_bytes(form, width, page_size)
    if pages.dtype != jnp.uint8 or pages.shape[-1] != expected:
        raise ValueError(
            f"pages are {pages.dtype} of {pages.shape[-1]} bytes: {page_size} rows of {width} channels take {expected}"
        )
    *leading, count, _ = pages.shape
    data, scales = page_layout(form, width)

    def plane(begin: int, size: int) -> jax.Array:
        part = pages[..., begin : begin + page_size * size]
        return part.reshape(*leading, count * page_size, size)

    return rows_of_bytes(plane(0, data), plane(page_size * data, scales), form)


def page_layout(form: RowFormat, width: int) -> tuple[int, int]:
    """Bytes of one row's data and of its scales; a page holds the data of all its rows, then their scales."""
    scales = 0 if form.quant is None else form.scales(width) * form.quant.scale_dtype.itemsize
    return form.nbytes(width) - scales, scales


def rows_of_bytes(data: UInt8[Array, "... data"], scales: UInt8[Array, "... scales"], form: RowFormat) -> Rows:
    """Rows of the bytes a page keeps of them."""
    body = data.shape[-1] - 2 * form.tail
    scale = None
    if scales.shape[-1]:
        assert form.quant is not None
        kind = np.dtype(np.uint8) if form.quant.scale == "ue8m0" else form.quant.scale_dtype
        scale = _from_bytes(scales, kind)
    values = np.dtype(form.plain) if form.quant is None else form.quant.values_dtype
    tail = _from_bytes(data[..., body:], jnp.dtype(jnp.bfloat16)) if form.tail else None
    return Rows(_from_bytes(data[..., :body], values), tail, scale, form)


def _bytes(x: jax.Array) -> jax.Array:
    """[..., n] of any dtype -> [..., n * itemsize] bytes, little-endian."""
    if x.dtype.itemsize == 1:
        return jax.lax.bitcast_convert_type(x, jnp.uint8)
    return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(*x.shape[:-1], x.shape[-1] * x.dtype.itemsize)


def _from_bytes(x: jax.Array, dtype: np.dtype) -> jax.Array:
    if dtype.itemsize == 1:
        return jax.lax.bitcast_convert_type(x, dtype)
    return jax.lax.bitcast_convert_type(x.reshape(*x.shape[:-1], x.shape[-1] // dtype.itemsize, dtype.itemsize), dtype)

"""Cached rows: what a window or a list of compressed entries is stored as, and what attention reads of it.

| format | body | tail | scale |
|---|---|---|---|
| plain | [..., N, K] bfloat16 or float32 | none | none |
| FP8 entry (interchange) | [..., N, K-R] E4M3 | [..., N, R] bfloat16, the rotary channels | [..., N, 8] E8M0 bytes |
| FP8, one scale for all | [..., N, K] E4M3 | none | none |
| INT8 | [..., N, K] int8 | none | [..., N, 1] float32 |
| FP8 index key | [..., N, Ki] E4M3 | none | [..., N, 1] float32, a power of two |
| FP4 index key | [..., N, Ki/2] E2M1 pairs | none | [..., N, Ki/32] E8M0 bytes |
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.formats import FormatError, QuantFormat
from pallas_kernels.quant.convert import quantize, scaled
from pallas_kernels.quant.hadamard import hadamard
from pallas_kernels.quant.tensor import QuantTensor
from pallas_kernels.row_format import RowFormat
from pallas_kernels.typing import typed


@functools.partial(jax.tree_util.register_dataclass, data_fields=["body", "tail", "scale"], meta_fields=["format"])
@dataclasses.dataclass(frozen=True)
class Rows:
    """N rows of some width, a pytree of what the table above lists; UE8M0 scales are kept as bytes.

    Every leaf is [..., N, something]: writing, gathering and shuffling rows are one `jax.tree.map`.
    """

    body: Any
    tail: Any
    scale: Any
    format: RowFormat

    @property
    def width(self) -> int:
        packing = self.format.quant.packing if self.format.quant else 1
        return self.body.shape[-1] * packing + self.format.tail

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape [..., N, width]."""
        return (*self.body.shape[:-1], self.width)

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def empty_rows(form: RowFormat, shape: tuple[int, ...]) -> Rows:
    """Rows of a logical `shape` [..., N, width] whose every byte is 0; they decode to 0. Raises FormatError."""
    *leading, width = shape
    if form.quant is None:
        return Rows(jnp.zeros(shape, form.plain), None, None, form)
    _require(form, width)
    body = (*leading, (width - form.tail) // form.quant.packing)
    scales = form.scales(width)
    return Rows(
        jnp.zeros(body, form.quant.values_dtype),
        jnp.zeros((*leading, form.tail), jnp.bfloat16) if form.tail else None,
        jnp.zeros((*leading, scales), _stored_scale(form.quant)) if scales else None,
        form,
    )


@typed
def encode_rows(x: Float[Array, "... N width"], form: RowFormat) -> Rows:
    """Stores the rows of x. Raises FormatError for a width the format cannot hold."""
    if form.quant is None:
        return Rows(x.astype(form.plain), None, None, form)
    _require(form, x.shape[-1])
    if form.hadamard:
        x = hadamard(x)
    split = x.shape[-1] - form.tail
    tail = x[..., split:].astype(jnp.bfloat16) if form.tail else None
    if form.fixed_scale is not None:
        fixed = jnp.asarray(form.fixed_scale, form.quant.scale_dtype)
        return Rows(quantize(x[..., :split], form.quant, scale=fixed).values, tail, None, form)
    whole = quantize(_fill(x[..., :split], form.quant), form.quant)
    scale = whole.scale
    if form.quant.scale == "ue8m0":
        scale = jax.lax.bitcast_convert_type(scale, jnp.uint8)
    reserved = form.scales(x.shape[-1]) - scale.shape[-1]
    scale = jnp.pad(scale, [(0, 0)] * (scale.ndim - 1) + [(0, reserved)])
    return Rows(whole.values[..., : split // form.quant.packing], tail, scale, form)


def decode_rows(rows: Rows, dtype: DTypeLike) -> Float[Array, "... N width"]:
    """The rows in `dtype`; those of a rotated format stay rotated."""
    form = rows.format
    if form.quant is None:
        return rows.body.astype(dtype)
    values = rows.body
    if form.fixed_scale is not None:
        scale = jnp.full((*values.shape[:-2], 1, 1), form.fixed_scale, form.quant.scale_dtype)
        quant = dataclasses.replace(form.quant, tile=(None, None))
    else:
        values = _fill(values, form.quant, form.quant.packing)
        quant, scale = form.quant, rows.scale[..., : _tiles(values.shape[-1] * form.quant.packing, form.quant)]
        if quant.scale == "ue8m0":
            scale = jax.lax.bitcast_convert_type(scale, quant.scale_dtype)
    body = scaled(QuantTensor(values, scale, quant), dtype)[..., : rows.width - form.tail]
    return body if rows.tail is None else jnp.concatenate([body, rows.tail.astype(dtype)], axis=-1)


def take_rows(rows: Rows, index: Int[Array, "B n"]) -> Rows:
    """Row index[b, i] of each sequence b of rows [B, N, width]: only what is named is read."""
    return jax.tree.map(lambda leaf: jnp.take_along_axis(leaf, index[..., None], axis=1), rows)


@typed
def as_cached(x: Float[Array, "... N width"], form: RowFormat) -> Float[Array, "... N width"]:
    """`x` as a cache of this format gives it back, in x's dtype. Gradients pass the rounding straight through."""
    return cast(jax.Array, _as_cached(x, form))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _as_cached(x: jax.Array, form: RowFormat) -> jax.Array:
    if form.quant is None and jnp.dtype(form.plain) == x.dtype:
        return x
    return decode_rows(encode_rows(x, form), x.dtype)


@_as_cached.defjvp
def _as_cached_jvp(form: RowFormat, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[Any, Any]:
    tangent = hadamard(tangents[0]) if form.hadamard else tangents[0]  # the rotation itself is linear
    return _as_cached(primals[0], form), tangent


def _require(form: RowFormat, width: int) -> None:
    if reason := form.unsupported_reason(width):
        raise FormatError(f"rows cannot hold this: {reason}")


def _stored_scale(form: QuantFormat) -> np.dtype:
    return np.dtype(np.uint8) if form.scale == "ue8m0" else form.scale_dtype


def _tiles(columns: int, form: QuantFormat) -> int:
    return 1 if form.tile[1] is None else columns // form.tile[1]


def _fill(x: jax.Array, form: QuantFormat, packing: int = 1) -> jax.Array:
    """Zeros behind the last column up to a whole tile: the last tile of a row may be short."""
    columns = form.tile[1]
    missing = 0 if columns is None else -x.shape[-1] % (columns // packing)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x

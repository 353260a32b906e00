"""The Hopper kernel as an implementation of `index_scores`: which calls it takes, and keys as it reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.block_matmul.sm90 import device_reason
from pallas_kernels.index_scores import reference
from pallas_kernels.index_scores.tiling import ITEM, default_tiling
from pallas_kernels.mosaic.scales import scale_bytes
from pallas_kernels.quant import Pages, Rows, quantize
from pallas_kernels.row_format import RowFormat

if TYPE_CHECKING:
    from pallas_kernels.index_scores.kernel_sm90 import Keys

WIDTHS = (32, 64, 128)  # bytes of E4M3 that a wgmma operand's rows are swizzled over
MOST_HEADS = 128  # whose weights a thread keeps
HEAD_STEP = 8  # heads are wgmma's columns: zero heads of weight zero fill them up
ALIGNMENT = 128  # bytes, of a copy to shared memory: a page has as many bytes of scales, or a multiple
TAKEN = {("e4m3", (1, None), "float32"), ("e2m1", (1, 32), "ue8m0")}


def unsupported_reason(q: Any, keys: Any, weights: jax.Array, counts: jax.Array | None = None) -> str | None:
    """Why the kernel does not take this call, None if it does. That shapes fit, the api has checked."""
    del weights, counts
    if reason := device_reason():
        return reason
    if not isinstance(keys, Rows | Pages):
        return "keys are not quantised: it reads E4M3 or E2M1 codes"
    if reason := _format_reason(keys.format):
        return f"keys are {reason}"
    if isinstance(q, Rows) and q.format != keys.format:
        return f"queries are stored as {q.format}, keys as {keys.format}"
    batch, tokens, heads, width = q.shape
    if width not in WIDTHS:
        return f"keys of {width} channels: it takes {', '.join(map(str, WIDTHS))}"
    if not 0 < heads <= MOST_HEADS:
        return f"{heads} heads: it takes up to {MOST_HEADS}"
    if isinstance(keys, Pages) and (reason := _page_reason(keys)):
        return reason
    entries = keys.rows if isinstance(keys, Pages) else keys.shape[-2]
    return None if batch * tokens * entries else "there is nothing to score"


def _format_reason(form: RowFormat) -> str | None:
    quant = form.quant
    if quant is None:
        return f"{form.plain}: it reads E4M3 or E2M1 codes"
    if (quant.element, quant.tile, quant.scale) not in TAKEN or form.fixed_scale is not None:
        return f"{quant.name}: it takes e4m3 with a float32 scale for each, and e2m1:1x32:ue8m0"
    return f"followed by {form.tail} channels of bfloat16" if form.tail else None


def _page_reason(pages: Pages) -> str | None:
    least = ALIGNMENT // _bytes_of_scales(pages.format, pages.width)
    if not pages.page_size % least and not (ITEM % pages.page_size and pages.page_size % ITEM):
        return None
    below = "".join(f"{size}, " for size in (32, 64) if size >= least)
    return f"pages of {pages.page_size} keys: it takes {below}{'and ' if below else ''}multiples of {ITEM}"


def _bytes_of_scales(form: RowFormat, width: int) -> int:
    """Of one key: one float32, or a byte for every 32 channels."""
    assert form.quant is not None
    return form.scales(width) * form.quant.scale_dtype.itemsize


def index_scores(
    q: jax.Array | Rows, keys: Rows | Pages, weights: jax.Array, counts: jax.Array | None = None
) -> jax.Array:
    """The op, with the kernel. Its gradients are the reference's, which computes everything again."""
    return _index_scores(q, keys, weights, counts)


def _forward(*args: Any) -> tuple[jax.Array, Any]:
    return _index_scores(*args), args


def _backward(args: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    q, keys, weights, counts = args
    _, pull = jax.vjp(lambda q, keys, weights: reference.index_scores(q, keys, weights, counts), q, keys, weights)
    return *pull(cotangent), None


@jax.custom_vjp
def _index_scores(q: jax.Array | Rows, keys: Rows | Pages, weights: jax.Array, counts: jax.Array | None) -> jax.Array:
    from pallas_kernels.index_scores import kernel_sm90  # Pallas is slow to import

    batch, tokens, heads, width = q.shape
    codes, scale = _queries(q, keys.format)
    operand = keys_of_pages(keys) if isinstance(keys, Pages) else keys_of_rows(keys)
    if counts is None:
        counts = jnp.full((batch, tokens), operand.entries, jnp.int32)
    if missing := -heads % HEAD_STEP:
        codes = jnp.pad(codes, ((0, 0), (0, 0), (0, missing), (0, 0)))
        scale, weights = (jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) for x in (scale, weights))
    tiling = default_tiling(tokens, heads + missing, width, operand.codes.dtype == jnp.int32)
    scores = kernel_sm90.index_scores(codes, scale, weights, operand, counts.astype(jnp.int32), tiling)
    entries = keys.rows if isinstance(keys, Pages) else keys.shape[1]
    return scores[..., :entries]


_index_scores.defvjp(_forward, _backward)


def _queries(q: jax.Array | Rows, form: RowFormat) -> tuple[jax.Array, jax.Array]:
    """Queries [B, T, H, ...] and their scales [B, T, H] as the kernel has them for keys of this format."""
    assert form.quant is not None, "unsupported_reason refuses plain keys"
    if isinstance(q, Rows):
        codes, scale = q.body, q.scale
    else:
        whole = quantize(q.astype(jnp.float32), form.quant)
        codes, scale = whole.values, scale_bytes(whole.scale)
    of_codes, of_scales, _ = _views(form, q.shape[-1])
    return _viewed(codes, of_codes), _viewed(scale, of_scales)[..., 0]


def keys_of_pages(pages: Pages) -> Keys:
    """Two views of the pool's bytes: codes as rows of a key each, which scales fill a few of, and scales as numbers."""
    from pallas_kernels.index_scores.kernel_sm90 import Keys

    pool, size, width = pages.pool, pages.page_size, pages.width
    codes, scale, of_codes = _views(pages.format, width)
    return Keys(
        codes=_viewed(pool.reshape(-1, of_codes), codes),
        scale=_viewed(pool, scale),
        table=pages.table,
        size=size,
        stride=size + size * _bytes_of_scales(pages.format, width) // of_codes,
        entries=pages.rows,
        shared=pages.table is None,
    )


def keys_of_rows(rows: Rows) -> Keys:
    """Rows [B, C, width] as one page a sequence; filled up, which copies them, unless C is a multiple of ITEM."""
    from pallas_kernels.index_scores.kernel_sm90 import Keys

    batch, entries, width = rows.shape
    missing = -entries % ITEM
    body, scale = rows.body, rows.scale
    if missing:
        body, scale = (jnp.pad(x, ((0, 0), (0, missing), (0, 0))) for x in (body, scale))
    size = entries + missing
    codes, of_scales, _ = _views(rows.format, width)
    body, scale = _viewed(body, codes), _viewed(scale, of_scales)
    return Keys(body.reshape(batch * size, -1), scale.reshape(batch, size), None, size, size, entries)


def _views(form: RowFormat, width: int) -> tuple[DTypeLike, DTypeLike, int]:
    """What a key's codes and scales are to the kernel: dtypes, the latter of all of a key's scales; bytes of codes."""
    assert form.quant is not None
    if form.quant.element == "e4m3":
        return jnp.float8_e4m3fn, jnp.float32, width
    return jnp.int32, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.int32}[width // 32], width // 2


def _viewed(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The bytes [..., n] as another dtype."""
    if x.dtype == dtype:
        return x
    size = jnp.dtype(dtype).itemsize
    grouped = x if size == 1 else x.reshape(*x.shape[:-1], -1, size)
    return jax.lax.bitcast_convert_type(grouped, dtype)

"""The Hopper kernel as an implementation of `index_scores`: which calls it takes, and keys as it reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_matmul.sm90 import device_reason
from pallas_kernels.index_scores.tiling import ITEM, default_tiling
from pallas_kernels.quant import Pages, Rows, quantize
from pallas_kernels.row_format import RowFormat

if TYPE_CHECKING:
    from pallas_kernels.index_scores.kernel_sm90 import Keys

WIDTHS = (32, 64, 128)  # bytes that a wgmma operand's rows are swizzled over
MOST_HEADS = 128  # whose weights a thread keeps
HEAD_STEP = 8  # heads are wgmma's columns: zero heads of weight zero fill them up
LEAST_PAGE = 32  # keys: the 128 bytes of scales that a copy to shared memory is aligned to


def unsupported_reason(q: Any, keys: Any, weights: jax.Array, counts: jax.Array | None = None) -> str | None:
    """None also means that counts and weights fit: the types of the api say so."""
    del weights, counts
    if reason := device_reason():
        return reason
    if not isinstance(keys, Rows | Pages):
        return "keys are not quantised: it reads E4M3 codes"
    if reason := _format_reason(keys.format):
        return f"keys are {reason}"
    if isinstance(q, Rows) and q.format != keys.format:
        return f"queries are stored as {q.format}, keys as {keys.format}"
    batch, tokens, heads, width = q.shape
    if width not in WIDTHS:
        return f"keys of {width} channels: it takes {', '.join(map(str, WIDTHS))}"
    if not 0 < heads <= MOST_HEADS:
        return f"{heads} heads: it takes up to {MOST_HEADS}"
    if isinstance(keys, Pages) and (keys.page_size % LEAST_PAGE or (ITEM % keys.page_size and keys.page_size % ITEM)):
        return f"pages of {keys.page_size} keys: it takes 32, 64, and multiples of {ITEM}"
    entries = keys.rows if isinstance(keys, Pages) else keys.shape[-2]
    return None if batch * tokens * entries else "there is nothing to score"


def _format_reason(form: RowFormat) -> str | None:
    quant = form.quant
    if quant is None:
        return f"{form.plain}: it reads E4M3 codes"
    if (quant.element, quant.tile, quant.scale) != ("e4m3", (1, None), "float32") or form.fixed_scale is not None:
        return f"{quant.name}: it takes e4m3 with a float32 scale for each"
    return f"followed by {form.tail} channels of bfloat16" if form.tail else None


def index_scores(
    q: jax.Array | Rows, keys: Rows | Pages, weights: jax.Array, counts: jax.Array | None = None
) -> jax.Array:
    from pallas_kernels.index_scores import kernel_sm90  # Pallas is slow to import

    batch, tokens, heads, width = q.shape
    if isinstance(q, Rows):
        codes, scale = q.body, q.scale
    else:
        assert keys.format.quant is not None, "unsupported_reason refuses plain keys"
        whole = quantize(q.astype(jnp.float32), keys.format.quant)
        codes, scale = whole.values, whole.scale
    operand = keys_of_pages(keys) if isinstance(keys, Pages) else keys_of_rows(keys)
    if counts is None:
        counts = jnp.full((batch, tokens), operand.entries, jnp.int32)
    scale = scale[..., 0]
    if missing := -heads % HEAD_STEP:
        of_heads = (0, 0), (0, 0), (0, missing)
        codes = jnp.pad(codes, (*of_heads, (0, 0)))
        scale, weights = (jnp.pad(x, of_heads) for x in (scale, weights))
    tiling = default_tiling(tokens, heads + missing, width)
    scores = kernel_sm90.index_scores(codes, scale, weights, operand, counts.astype(jnp.int32), tiling)
    entries = keys.rows if isinstance(keys, Pages) else keys.shape[1]
    return scores[..., :entries]


def keys_of_pages(pages: Pages) -> Keys:
    """Two views of the pool's bytes: codes as rows of the keys' width, which scales fill a few of, and float32."""
    from pallas_kernels.index_scores.kernel_sm90 import Keys

    pool, size, width = pages.pool, pages.page_size, pages.width
    return Keys(
        codes=jax.lax.bitcast_convert_type(pool, jnp.float8_e4m3fn).reshape(-1, width),
        scale=jax.lax.bitcast_convert_type(pool.reshape(pool.shape[0], -1, 4), jnp.float32),
        table=pages.table,
        size=size,
        stride=size + 4 * size // width,
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
    return Keys(body.reshape(-1, width), scale.reshape(batch, size), None, size, size, entries)

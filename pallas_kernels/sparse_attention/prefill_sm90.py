"""The prefill form on Hopper: the kernel of the decode form, for which the window is a list of rows as well.

Entries that are quantised are decoded first, once for all queries that name them, to bfloat16, which holds E4M3 times
a power of two exactly; so rows of the band and entries are of one format, and one launch has both. Queries come after
each other: what neighbours read is in the L2 cache. Its gradients are those of `prefill_blocks`.

Bound: products, 4 T H K (W + k) FLOPs. On an H200, 2048 queries of 64 heads over 128 + 512 of 4096 entries: 618 us,
28 % of it; XLA 2546.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_matmul.sm90 import device_reason
from pallas_kernels.quant import Rows
from pallas_kernels.row_format import entry_format
from pallas_kernels.sparse_attention import prefill_blocks, reference, sm90

ALIGNED = 8  # channels that are loaded at once
MOST_WIDTH = 1024  # rows of a window: each query has a list of them


def unsupported_reason(
    q: jax.Array,
    band: jax.Array,
    start: jax.Array,
    compressed: jax.Array | Rows | None,
    compressed_index: jax.Array | None,
    compressed_count: jax.Array | None,
    sink: jax.Array | None,
    *,
    width: int,
    scale: float,
) -> str | None:
    """Why the kernel does not take this call, None if it does."""
    del start, sink, scale
    if reason := device_reason() or sm90.numbers_reason(compressed_index, compressed_count):
        return reason
    heads, channels = q.shape[2:]
    if q.dtype != jnp.bfloat16 or band.dtype != jnp.bfloat16:
        return f"q is {q.dtype} and the band {band.dtype}: it takes bfloat16"
    if isinstance(compressed, jax.Array | jax.ShapeDtypeStruct) and compressed.dtype != jnp.bfloat16:
        return f"compressed entries are {compressed.dtype}: it takes bfloat16 and Rows"
    if heads == 0 or not 0 < channels <= sm90.WIDTH or channels % ALIGNED:
        return f"{heads} heads of {channels} channels: it takes multiples of {ALIGNED} up to {sm90.WIDTH}"
    if 0 in (*q.shape, width) or (compressed is not None and 0 in compressed.shape):
        return f"q is of shape {q.shape}, the window of {width} rows, entries of {getattr(compressed, 'shape', None)}"
    if min(width, band.shape[1]) > MOST_WIDTH:
        return f"a window of {width} rows: it takes up to {MOST_WIDTH}"
    return None


def attend(
    q: jax.Array,
    band: jax.Array,
    start: jax.Array,
    compressed: jax.Array | Rows | None,
    compressed_index: jax.Array | None,
    compressed_count: jax.Array | None,
    sink: jax.Array | None,
    *,
    width: int,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """The op, with the kernel."""
    return _attend(width, scale, q, band, start, compressed, compressed_index, compressed_count, sink)


def _forward(width: int, scale: float, *args: Any) -> tuple[Any, Any]:
    return _attend(width, scale, *args), args


def _backward(width: int, scale: float, args: Any, cotangents: Any) -> tuple[Any, ...]:
    q, band, start, compressed, index, count, sink = args

    def again(q: jax.Array, band: jax.Array, compressed: Any, sink: Any) -> Any:
        named = (start, compressed, index, count, sink)
        return prefill_blocks.sparse_attention_prefill(q, band, *named, width=width, scale=scale)

    _, pull = jax.vjp(again, q, band, compressed, sink)
    of_q, of_band, of_compressed, of_sink = pull(cotangents)
    return of_q, of_band, None, of_compressed, None, None, of_sink


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    width: int,
    scale: float,
    q: jax.Array,
    band: jax.Array,
    start: jax.Array,
    compressed: jax.Array | Rows | None,
    compressed_index: jax.Array | None,
    compressed_count: jax.Array | None,
    sink: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    entries = None if compressed is None else _rows(reference.plain(compressed, q.dtype))
    window_index = window_rows(start, q.shape[1], band.shape[1], width)
    return sm90.attend(q, _rows(band), window_index, entries, compressed_index, compressed_count, sink, scale=scale)


_attend.defvjp(_forward, _backward)


def window_rows(start: jax.Array, tokens: int, rows: int, width: int) -> jax.Array:
    """int32 [B, T, W]: the rows of a band [B, S, K] that each query sees, -1 for none; W is `width` or less."""
    width = min(width, rows)
    history = rows - tokens
    row = history + jnp.arange(tokens, dtype=jnp.int32)[:, None] - jnp.arange(width, dtype=jnp.int32)[None, ::-1]
    row = row[None]
    position = start.astype(jnp.int32)[:, None, None] - history + row
    return jnp.where((row >= 0) & (position >= 0), row, -1)


def _rows(x: jax.Array) -> Rows:
    return Rows(x, None, None, entry_format("bfloat16", 0))

"""The Hopper kernel as an implementation of `sparse_attention`: which calls it takes, and how entries lie in memory."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_matmul.sm90 import device_reason
from pallas_kernels.mosaic.launch import sm_count
from pallas_kernels.quant import Pages, Rows
from pallas_kernels.quant.pages import page_bytes, page_layout
from pallas_kernels.rotary import Rotation
from pallas_kernels.row_format import entry_format
from pallas_kernels.sparse_attention import reference
from pallas_kernels.sparse_attention.tiling import divide, takes_many

if TYPE_CHECKING:
    from pallas_kernels.sparse_attention.entries_sm90 import Layout, Source

HEADS = 64  # a thread block's: fewer are filled up
WIDTH = 512  # channels at most
TILE = 64  # channels that share a scale
PIECE = 16  # bytes that are loaded at once
MOST_QUERIES = 4  # of a sequence
LIST = 64  # entries of a list that are loaded at once


def unsupported_reason(
    q: jax.Array,
    window: Any,
    window_index: jax.Array,
    compressed: Any,
    compressed_index: jax.Array | None,
    compressed_count: jax.Array | None,
    sink: jax.Array | None,
    *,
    scale: float,
    rotation: Rotation | None = None,
) -> str | None:
    """Why the kernel does not take this call, None if it does."""
    del sink, scale
    if reason := device_reason():
        return reason
    _, tokens, heads, width = q.shape
    if q.dtype != jnp.bfloat16:
        return f"q is {q.dtype}: it takes bfloat16"
    if heads == 0 or not 0 < width <= WIDTH:
        return f"{heads} heads of {width} channels: it takes one or more of at most {WIDTH}"
    if not 0 < tokens <= MOST_QUERIES or q.shape[0] == 0:
        return f"q of shape {q.shape}: it takes 1 to {MOST_QUERIES} queries of a sequence"
    if reason := numbers_reason(window_index, compressed_index, compressed_count):
        return reason
    if window_index.shape[-1] == 0 and (compressed is None or _names_none(compressed_index)):
        return "there are no entries"
    formats = set()
    for name, entries in (("window", window), ("compressed", compressed)):
        if entries is not None:
            if reason := _entries_reason(entries):
                return f"{name} entries {reason}"
            formats.add(entries.format)
    if len(formats) > 1:
        return f"entries are stored in two formats: {formats}"
    turned, tail = 0 if rotation is None else 2 * rotation.cos.shape[-1], _sizes(window)[1] // 2
    if turned > tail and len(_spread(window)) > 1:
        return f"{turned} channels are turned, of which {tail} lie behind codes that do not fill tiles of {TILE}"
    return None


def _names_none(index: jax.Array | None) -> bool:
    return index is not None and index.shape[-1] == 0


def numbers_reason(*numbers: jax.Array | None) -> str | None:
    """Why the kernel does not take these indices and counts of entries, None if it does."""
    types = {x.dtype for x in numbers if x is not None} - {jnp.dtype(jnp.int32)}
    return f"entries are numbered in {', '.join(map(str, types))}: it takes int32" if types else None


def _entries_reason(entries: Any) -> str | None:
    if not isinstance(entries, Rows | Pages):
        return "are a plain array: it takes Rows and Pages"
    form = entries.format
    if form not in (entry_format("fp8", form.tail), entry_format("bfloat16", 0)):
        name = form.quant.name if form.quant else form.plain
        return f"are stored as {name}: it takes FP8 entries of the interchange layout, and bfloat16"
    codes, tail = _sizes(entries)
    if codes % PIECE or tail % PIECE:
        return f"have {codes} codes and {tail} bytes of bfloat16 channels: it takes multiples of {PIECE}"
    if codes and not 0 < tail <= 2 * TILE:
        return f"have {tail} bytes of bfloat16 channels beside codes: it takes {PIECE} to {2 * TILE}"
    if 0 in (entries.pool if isinstance(entries, Pages) else entries.body).shape:
        return "are none at all"
    return None


def _sizes(entries: Rows | Pages) -> tuple[int, int]:
    """Bytes of an entry's codes and of its bfloat16 channels."""
    if entries.format.quant is None:
        return 0, 2 * entries.width
    return entries.width - entries.format.tail, 2 * entries.format.tail


def attend(
    q: jax.Array,
    window: Rows | Pages,
    window_index: jax.Array,
    compressed: Rows | Pages | None,
    compressed_index: jax.Array | None,
    compressed_count: jax.Array | None,
    sink: jax.Array | None,
    *,
    scale: float,
    rotation: Rotation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The op, with the kernel. Its gradients are the reference's, which gathers and computes everything again."""
    named = (compressed_index, compressed_count)
    return _attend(scale, q, window, window_index, compressed, *named, sink, rotation)


def _forward(scale: float, *args: Any) -> tuple[Any, Any]:
    return _attend(scale, *args), args


def _backward(scale: float, args: Any, cotangents: Any) -> tuple[Any, ...]:
    q, window, window_index, compressed, compressed_index, compressed_count, sink, rotation = args

    def again(q: jax.Array, window: Any, compressed: Any, sink: Any, rotation: Any) -> Any:
        named = (compressed_index, compressed_count)
        how = {"scale": scale, "rotation": rotation}
        return reference.sparse_attention(q, window, window_index, compressed, *named, sink, **how)

    _, pull = jax.vjp(again, q, window, compressed, sink, rotation)
    of_q, of_window, of_compressed, of_sink, of_rotation = pull(cotangents)
    return of_q, of_window, None, of_compressed, None, None, of_sink, of_rotation


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    scale: float,
    q: jax.Array,
    window: Rows | Pages,
    window_index: jax.Array,
    compressed: Rows | Pages | None,
    compressed_index: jax.Array | None,
    compressed_count: jax.Array | None,
    sink: jax.Array | None,
    rotation: Rotation | None,
) -> tuple[jax.Array, jax.Array]:
    # Pallas is slow to import.
    from pallas_kernels.sparse_attention import combine_sm90, entries_sm90, kernel_sm90, turn_sm90
    from pallas_kernels.sparse_attention.many import kernel_sm90 as many_sm90

    batch, tokens, heads, width = q.shape
    sources = []
    if window_index.shape[-1]:
        sources.append(source(window, window_index, None))
    if compressed is not None and not _names_none(compressed_index):
        sources.append(source(compressed, compressed_index, compressed_count))
    spread = _spread(window)
    filled = -(-heads // HEADS) * HEADS
    flat = _filled(_at(q.reshape(batch * tokens, heads, width), spread), 1, filled)
    sink = None if sink is None else _filled(sink.astype(jnp.float32), 0, filled)
    blocks = sum(-(-layout.most // entries_sm90.BLOCK) for layout, _ in sources)
    units = batch * tokens * filled // HEADS
    division = divide(units, blocks, flat.shape[-1], sm_count())
    factors, turned_from = None, flat.shape[-1]
    if rotation is not None:
        end = sum(spread[-1])
        factors, turned_from = turn_sm90.factors(rotation, flat.shape[-1], end), end - 2 * rotation.cos.shape[-1]
    attend = functools.partial(kernel_sm90.attend, division=division)
    if division.parts == 1 and takes_many(units, blocks, sm_count()):
        attend = functools.partial(many_sm90.attend, turned_from=turned_from)
    out, lse = attend(flat, sources, sink, factors, tokens=tokens, scale=scale)
    if division.parts > 1:
        out, lse = combine_sm90.combine(out, lse, sink, factors, q.dtype)
    out = jnp.concatenate([out[:, :heads, begin : begin + size] for begin, size in spread], axis=-1)
    return out.reshape(q.shape), lse[:, :heads].reshape(q.shape[:-1])


_attend.defvjp(_forward, _backward)


def _spread(entries: Rows | Pages) -> list[tuple[int, int]]:
    """Where the kernel has an entry's channels, begin and size: what are codes, and from a whole tile on the rest."""
    codes, tail = _sizes(entries)
    behind = -(-codes // TILE) * TILE
    return [(0, entries.width)] if behind == codes else [(0, codes), (behind, tail // 2)]


def _at(q: jax.Array, spread: list[tuple[int, int]]) -> jax.Array:
    """The channels of q [N, H, K] where the kernel has them, zeros elsewhere."""
    parts, begin = [], 0
    for at, size in spread:
        parts += [
            jnp.zeros((*q.shape[:2], at - sum(x.shape[-1] for x in parts)), q.dtype),
            q[..., begin : begin + size],
        ]
        begin += size
    joined = jnp.concatenate(parts, axis=-1)
    return _filled(joined, 2, -(-joined.shape[-1] // (2 * TILE)) * (2 * TILE))


def _filled(x: jax.Array, axis: int, size: int) -> jax.Array:
    """x, with zeros up to `size`."""
    return jnp.pad(x, [(0, (size - x.shape[axis]) if i == axis else 0) for i in range(x.ndim)])


def source(entries: Rows | Pages, index: jax.Array | None, count: jax.Array | None) -> tuple[Layout, Source]:
    """What the kernel is told of entries, of the index [B, T, W] into them and of the counts [B, T]."""
    from pallas_kernels.sparse_attention.entries_sm90 import Layout, Source
    from pallas_kernels.sparse_attention.held_sm90 import Part, Parts

    form, width = entries.format, entries.width
    codes, tail = _sizes(entries)
    if isinstance(entries, Pages):
        data, scales = page_layout(form, width)
        page, behind = page_bytes(form, width, entries.page_size), entries.page_size * data
        of_codes, of_tail, of_scale = (
            Part(0, page, *where) for where in ((data, 0, codes), (data, codes, tail), (scales, behind, scales))
        )
        arrays, table, page_size, capacity = (entries.pool,), entries.table, entries.page_size, entries.rows
    else:
        capacity = entries.shape[1]
        arrays = (entries.body, entries.tail, entries.scale) if codes else (entries.body,)
        sizes = (codes, tail, form.scales(width)) if codes else (0, tail, 0)
        of_codes, of_tail, of_scale = (
            Part(i if codes else 0, capacity * size, size, 0, size) for i, size in enumerate(sizes)
        )
        table, page_size = None, None
    parts = Parts(of_codes, of_tail, of_scale) if codes else Parts(None, of_tail, None)
    most = capacity if index is None else index.shape[-1]
    if index is not None:
        index = index.reshape(-1, most)
        index = jnp.pad(index, ((0, 0), (0, -most % LIST)))
    count = None if count is None else count.reshape(-1)
    return Layout(parts, page_size, most), Source(arrays, table, index, count)

"""Benchmarks of compression into a cache: a decode step's, where a block closes and where none does, and a chunk's.

Caches and open blocks are donated and put back, as a step of decoding does it. XLA's side is the reference, jitted.

A stored number is right where it is a rounding of the reference's float32 number or of one at most MOVED away, in units
of the entry's rms. An entry is a sum over rows, whose orders differ. Each weight exp(gate - peak) is off by 2^-21 (the
difference, below 8 for all that count, by 2^-22, exp by as much), the kernel's by two of those (an entry's parts are
scaled once more): 3 x 2^-21 apart. With signs at their worst that counts 3.3 times in units of the rms (128 rows: what
|c| adds up to over what is left of c), and up to twice behind the norm's weight: 2^-16.7, to which sums add little.
On a CPU the interpreted kernel and the reference are within 2^-19.3 of float64, and of the 229 376 codes of BENCH's
chunk at ratio 4 741, small ones for the most part, lie so close to where the rounding changes that both neighbours are
right.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench.case import Bench
from pallas_kernels.compress import initial_state, kernel_sm90, reference
from pallas_kernels.compress.cases import BENCH, CompressCase
from pallas_kernels.quant import empty_rows
from pallas_kernels.quant.hadamard import hadamard
from pallas_kernels.quant.rows import Rows, encode_rows
from pallas_kernels.row_format import RowFormat, entry_format, index_format

EPS = 1e-6
MOVED = 2.0**-16
ENTRIES = 16  # a sequence's cache has before the new ones
Inputs = list[Any]  # rows and state, which are replaced, and the other arguments


def benches() -> Iterator[Bench]:
    return map(bench, BENCH)


def bench(case: CompressCase) -> Bench:
    return Bench(
        op="compress",
        name=case.name,
        inputs=functools.partial(inputs, case),
        ours={"sm90": functools.partial(donated, case, kernel_sm90.compress_into)},
        xla={"reference": functools.partial(donated, case, reference.compress_into)},
        reference=functools.partial(unrounded, case),
        part=lambda result: result[:2],
        judge=difference,
        in_place=True,
        nbytes=nbytes(case),
        flops=0,
        shape={"b": case.batch, "t": case.tokens, "m": case.ratio, "w": case.halves * case.width},
    )


def form_of(case: CompressCase) -> RowFormat:
    return entry_format("fp8", case.rope) if case.kind == "entry" else index_format("fp8")


def nbytes(case: CompressCase) -> int:
    """New rows in, and into the rings where they stay; rows of the entries that close; the entries, and ape."""
    row, ratio = 8 * case.halves * case.width, case.ratio
    closed = 0 if not case.closes else max(1, case.tokens // ratio)
    kept = min(case.tokens, case.halves * ratio + 3)
    before = max(case.halves * ratio - case.tokens, 0) * 8 * case.width if case.closes else 0
    each = (case.tokens + kept) * row + before + closed * form_of(case).nbytes(case.width)
    return case.batch * each + ratio * row // 2


def inputs(case: CompressCase, key: jax.Array) -> Inputs:
    """Rows, state, and kv, gate, start, count, ape, the norm's weight."""
    keys = iter(jax.random.split(key, 6))
    width = case.halves * case.width
    state = initial_state(case.batch, case.ratio, width, case.halves == 2)
    state = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), state)
    kv, gate = (jax.random.normal(next(keys), (case.batch, case.tokens, width)) for _ in range(2))
    blocks = -(-case.tokens // case.ratio)
    start = (ENTRIES + blocks) * case.ratio - case.tokens - (0 if case.closes else 1)
    rows = empty_rows(form_of(case), (case.batch, ENTRIES + blocks, case.width))
    ape = jax.random.normal(next(keys), (case.ratio, width))
    weight = 1 + jax.random.normal(next(keys), (case.width,)) / 4
    whole = functools.partial(jnp.full, (case.batch,), dtype=jnp.int32)
    return [rows, state, kv, gate, whole(start), whole(case.tokens), ape, weight]


def donated(case: CompressCase, compress_into: Callable[..., Any], sets: Inputs) -> Inputs:
    """The input set itself, with rows and state replaced: of a step, they come out the same again and again.

    A chunk's first entries have rows of the open blocks, in whose place the next call finds the chunk's last ones.
    """
    sets[0], sets[1] = in_place(case, compress_into, *sets)
    return sets


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def in_place(case: CompressCase, compress_into: Callable[..., Any], *sets: Any) -> tuple[Any, Any]:
    return _call(case, compress_into, *sets)


@functools.partial(jax.jit, static_argnums=0)
def unrounded(case: CompressCase, sets: Inputs) -> Inputs:
    """What `difference` judges by: rows, and the state of the open blocks.

    Body and tail are float32, scales [.., 2] the least and the largest that are right. Rows not written are 0.
    """
    form, split = form_of(case), case.width - form_of(case).tail
    empty = empty_rows(entry_format("float32", case.rope), sets[0].shape)
    rows, state = _call(case, reference.compress_into, empty, *sets[1:])
    wide = hadamard(rows.body) if form.hadamard else rows.body
    rotated, size, off = dataclasses.replace(form, hadamard=False), jnp.abs(wide), moved(wide)
    scales = [encode_rows(x, rotated).scale for x in (jnp.maximum(size - off, 0), size + off)]
    scale = jnp.where((off > 0)[..., None], jnp.stack(scales, axis=-1), 0)
    return [Rows(wide[..., :split], wide[..., split:] if form.tail else None, scale, form), state]


def moved(wide: Any) -> jax.Array:
    """How far numbers [.., K] of an entry may be from the reference's: [.., 1]."""
    return MOVED * jnp.sqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True))


def _call(case: CompressCase, compress_into: Callable[..., Any], rows: Any, state: Any, *rest: Any) -> tuple[Any, Any]:
    kv, gate, *others = rest
    pair = np.arange(case.rope // 2, dtype=np.float32)
    frequencies = jnp.asarray(1e-4 ** (pair / pair.size))  # a constant, as in a model
    return compress_into(rows, kv, gate, state, *others, frequencies, norm_eps=EPS)


def difference(got: Inputs, want: Inputs) -> str | None:
    """Why rows or state are not right by what `unrounded` gives; None if they are. State is copied: bit for bit."""
    for ours, theirs in zip(got[1], want[1], strict=True):
        if not np.array_equal(ours, theirs):
            return "the open blocks differ"
    (rows, *_), (exact, *_) = got, want
    for name, (least, largest) in bounds(rows, exact).items():
        ours = ranked(getattr(rows, name))
        outside = (ours < ranked(least)) | (ours > ranked(largest))
        if outside.any():
            where = np.unique(np.argwhere(outside)[:, :2], axis=0)
            return (
                f"{outside.sum()} of {outside.size} of the {name} are no roundings of the reference's "
                f"(rows: {len(where)}, first {tuple(where[0].tolist())})"
            )
    return None


def bounds(rows: Rows, exact: Rows) -> dict[str, tuple[Any, Any]]:
    """The least and the largest right number of each part, of codes by the scales that rows have; scales come first."""
    body, tail = (None if x is None else np.asarray(x) for x in (exact.body, exact.tail))
    quant, scale = rows.format.quant, np.asarray(rows.scale)
    assert body is not None and quant is not None
    off = np.asarray(moved(body if tail is None else np.concatenate([body, tail], axis=-1)))
    if quant.scale == "ue8m0":
        scale = np.exp2(scale.astype(np.float32) - 127)
    columns = body.shape[-1] if quant.tile[1] is None else quant.tile[1]
    spread = np.repeat(scale, columns, axis=-1)[..., : body.shape[-1]]
    spread = np.where(spread == 0, 1, spread)  # of rows not written

    def code(wide: np.ndarray) -> np.ndarray:
        return np.clip(wide / spread, -quant.largest, quant.largest).astype(quant.values_dtype)

    found = {"scale": (exact.scale[..., 0], exact.scale[..., 1]), "body": (code(body - off), code(body + off))}
    if tail is not None:
        found["tail"] = tuple(x.astype(jnp.bfloat16) for x in (tail - off, tail + off))
    return found


def ranked(x: Any) -> np.ndarray:
    """Numbers as integers in the same order, neighbours one apart: -0 below 0, NaN beyond all others."""
    x = np.asarray(x)
    if x.dtype == np.uint8:  # UE8M0
        return x.astype(np.int64)
    bits = x.view(f"i{x.itemsize}").astype(np.int64)
    return np.where(bits < 0, -(1 << (8 * x.itemsize - 1)) - 1 - bits, bits)

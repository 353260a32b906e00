"""Compression into a cache on Hopper against the reference: rows, open blocks, and what neither may touch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench import compress as bench
from pallas_kernels.bench import measure
from pallas_kernels.compress import CompressorState, compress_into, initial_state, kernel_sm90, reference
from pallas_kernels.compress.cases import BENCH, SMALL
from pallas_kernels.compress.tiling import rows_at_once, unsupported_reason
from pallas_kernels.device import KINDS, pretend
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.mosaic import interpreted
from pallas_kernels.quant import empty_rows
from pallas_kernels.ring import MAX_STEP
from pallas_kernels.row_format import entry_format, index_format

HOPPER = KINDS["H100 / H200"]
EPS = 1e-6
ENTRY, KEY = entry_format("fp8", 16), index_format("fp8")
plain = jax.jit(functools.partial(reference.compress_into, norm_eps=EPS))


def problem(tokens, ratio, halves, width, rope, form, *, start, count, capacity=8):
    """Arguments of `compress_into`. What was never written, and rows behind the count, are NaN; row bytes are 7."""
    rng = np.random.default_rng(ratio)
    batch, wide = len(start), halves * width
    slots = initial_state(1, ratio, wide, halves == 2).kv.shape[1]

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    state = CompressorState(normal(batch, slots, wide), normal(batch, slots, wide))
    kv, gate = normal(batch, tokens, wide), normal(batch, tokens, wide)
    for b in range(batch):
        kv[b, count[b] :], gate[b, count[b] :] = np.nan, np.nan
        for ring in state:
            ring[b, start[b] :] = np.nan
    frequencies = 100.0 ** -np.linspace(0, 1, rope // 2)
    rows = jax.tree.map(lambda x: jnp.full_like(x, 7), empty_rows(form, (batch, capacity, width)))
    rest = (normal(ratio, wide), 1 + normal(width) / 4, frequencies.astype(np.float32))
    start, count = (jnp.asarray(x, jnp.int32) for x in (start, count))
    return jax.tree.map(jnp.asarray, (rows, kv, gate, state, start, count, *rest))


def run(*arguments):
    with interpreted():
        call = functools.partial(compress_into, norm_eps=EPS, implementation="sm90")
        return jax.block_until_ready(jax.jit(call)(*arguments))


def bits(tree):
    return [np.asarray(x).view(np.uint8) for x in jax.tree.leaves(tree)]


def check(got, want):
    """State bit for bit; of the rows' bytes one in a thousand may differ, and of plain float32 rows the last bits."""
    for ours, theirs in zip(bits(got[1]), bits(want[1]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    if got[0].format.plain == "float32" and got[0].format.quant is None:
        np.testing.assert_allclose(got[0].body, want[0].body, rtol=1e-5, atol=1e-6)
        return
    reserved = got[0].format.tail and got[0].width < 512  # scale bytes that mean nothing
    for part in ("body", "tail", "scale"):
        ours, theirs = (getattr(result[0], part) for result in (got, want))
        if ours is not None:
            ours, theirs = (np.asarray(x)[..., : 1 if reserved and part == "scale" else None] for x in (ours, theirs))
            ours, theirs = (np.ascontiguousarray(x).view(np.uint8) for x in (ours, theirs))
            assert np.mean(ours != theirs) <= 1e-3


@pytest.mark.parametrize(
    ("tokens", "ratio", "halves", "width", "rope", "form", "start", "count"),
    [
        (1, 4, 2, 512, 64, entry_format("fp8", 64), (11, 3), (1, 1)),  # V4-Flash's CSA; entry 0 has no block before it
        (2, 4, 2, 128, 64, KEY, (10, 7), (2, 2)),  # its indexer
        (1, 128, 1, 512, 64, entry_format("fp8", 64), (255,), (1,)),  # its HCA
        (4, 4, 2, 64, 16, ENTRY, (9, 12, 5), (4, 3, 0)),  # the shipped model: closed, open, and no token at all
        (1, 4, 2, 32, 16, KEY, (3, 4), (1, 1)),
        (3, 2, 2, 64, 16, entry_format("bfloat16", 16), (6, 13), (3, 3)),  # two blocks close in one step
        (1, 16, 2, 32, 16, entry_format("float32", 16), (31, 15), (1, 1)),  # more rows than are loaded at once
        (11, 4, 2, 64, 16, ENTRY, (0, 6), (11, 9)),  # a chunk: rows of the ring and of the chunk
        (9, 32, 1, 64, 16, ENTRY, (30, 0), (9, 9)),
        (20, 16, 2, 32, 16, KEY, (13, 0), (20, 18)),  # parts of long entries, of two blocks each
    ],
)
def test_kernel(tokens, ratio, halves, width, rope, form, start, count):
    arguments = problem(tokens, ratio, halves, width, rope, form, start=start, count=count)
    check(run(*arguments), plain(*arguments))


def test_entries_beyond_the_cache_are_dropped():
    arguments = problem(1, 4, 2, 64, 16, ENTRY, start=(15, 11), count=(1, 1), capacity=3)
    got = run(*arguments)
    check(got, plain(*arguments))
    np.testing.assert_array_equal(np.asarray(got[0].body[0]).view(np.uint8), bits(arguments[0].body[0])[0])


def test_a_sequence_does_not_depend_on_the_others():
    arguments = problem(2, 4, 2, 64, 16, ENTRY, start=(14, 2, 6, 5), count=(2, 2, 2, 1))
    order = np.array([2, 0, 3, 1])
    of_batch, rest = arguments[:6], arguments[6:]
    whole = run(*arguments)
    permuted = run(*jax.tree.map(lambda x: x[order], of_batch), *rest)
    alone = run(*jax.tree.map(lambda x: x[1:2], of_batch), *rest)
    for all_, moved, one in zip(bits(whole), bits(permuted), bits(alone), strict=True):
        np.testing.assert_array_equal(all_[order], moved)
        np.testing.assert_array_equal(all_[1:2], one)


def test_what_is_not_finite_stays_in_its_entry():
    arguments = list(problem(1, 4, 2, 64, 16, ENTRY, start=(7, 11), count=(1, 1)))
    arguments[1] = arguments[1].at[0, 0, 70].set(jnp.inf)
    got, want = run(*arguments), plain(*arguments)
    assert got[0].scale[0, 1, 0] == want[0].scale[0, 1, 0] == 255
    check(jax.tree.map(lambda x: x[1:], got), jax.tree.map(lambda x: x[1:], want))


def test_drafts_are_taken_back():
    """Four drafts that close a block, none kept, then the true tokens: the same row as without the drafts."""
    rows, kv, gate, state, start, count, *rest = problem(4, 4, 2, 64, 16, ENTRY, start=(9, 10), count=(4, 4))
    drafted, after = run(rows, 50 * kv + 1, -gate, state, start, count, *rest)
    again, straight = (run(*x, start, count, *rest) for x in ((drafted, kv, gate, after), (rows, kv, gate, state)))
    for ours, theirs in zip(bits(again[0]), bits(straight[0]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_parts_of_an_entry():
    assert [rows_at_once(ratio, halves) for ratio, halves in ((4, 2), (128, 1), (16, 2), (12, 2))] == [8, 16, 16, 12]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kv": ((2, 1, 128), jnp.bfloat16)}, "the projections are bfloat16 and float32"),
        ({"form": entry_format("int8", 16)}, "it writes plain ones, FP8 entries and"),
        ({"form": index_format("fp4")}, "rows of e2m1"),
        ({"form": entry_format("fp8", 24)}, "FP8 entries of 64 channels with 24 rotary ones"),
        ({"width": 96}, "entries are 96 wide: it takes 32, 64, 128 and 512"),
        ({"slots": 10}, "the open blocks have 10 slots: it takes 11 or more"),
    ],
)
def test_refusals(change, reason):
    width, form = change.get("width", 64), change.get("form", ENTRY)
    shape = jax.ShapeDtypeStruct
    shape_of_kv, dtype = change.get("kv", ((2, 1, 2 * width), jnp.float32))
    rows = jax.eval_shape(lambda: empty_rows(form, (2, 8, width)))
    ring = shape((2, change.get("slots", 11), 2 * width), jnp.float32)
    kv, gate, number = shape(shape_of_kv, dtype), shape((2, 1, 2 * width), jnp.float32), shape((2,), jnp.int32)
    fixed = shape((4, 2 * width), jnp.float32), shape((width,), jnp.float32), shape((8,), jnp.float32)
    call = functools.partial(
        unsupported_reason, rows, kv, gate, CompressorState(ring, ring), number, number, *fixed, norm_eps=EPS
    )
    with pretend(HOPPER):
        assert reason in (call() or "")
    with pretend(KINDS["A100"]):
        assert call() == "A100 is no Hopper GPU (compute capability 9.0)"


def test_a_named_kernel_is_refused_elsewhere():
    arguments = problem(1, 4, 2, 64, 16, ENTRY, start=(3,), count=(1,))
    with (
        pretend(KINDS["CPU"]),
        pytest.raises(UnsupportedError, match="compress cannot run: sm90: CPU is no Hopper GPU"),
    ):
        compress_into(*arguments, norm_eps=EPS, implementation="sm90")


@pytest.mark.parametrize("case", [BENCH[2], BENCH[9], BENCH[-2]], ids=lambda case: case.name)
def test_lowers_for_a_gpu_in_place(case):
    """What the interpreter does not know: layouts and transfers."""
    made = jax.eval_shape(functools.partial(bench.inputs, case), jax.random.key(0))
    lowered = bench.in_place.trace(case, kernel_sm90.compress_into, *made).lower(lowering_platforms=("cuda",))
    donated = len(jax.tree.leaves(made[:2]))
    assert lowered.as_text().count("tf.aliasing_output") == donated


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_a_benchmark_computes_what_it_says(case):
    of_case = bench.bench(case)
    sets = jax.jit(of_case.inputs)(jax.random.key(0))
    want = of_case.reference(sets)
    assert of_case.in_place and of_case.wrong(sets, want) == "the open blocks differ"
    copies = [jax.tree.map(jnp.copy, sets) for _ in range(2)]
    with interpreted():
        assert of_case.wrong(jax.block_until_ready(of_case.ours["sm90"](copies[0])), want) is None
    assert of_case.wrong(of_case.xla["reference"](copies[1]), want) is None
    again = of_case.wrong(of_case.xla["reference"](copies[1]), want)
    assert again is None if case.tokens <= MAX_STEP else "no roundings" in again
    assert len(list(bench.benches())) == len(BENCH) and of_case.limit > 0


def test_a_chunk_is_checked_on_inputs_that_nobody_has_used(monkeypatch):
    """XLA is timed first. It leaves other open blocks behind than the reference was made of, and its own results."""

    def microseconds(call, sets):
        for inputs in 2 * sets:
            call(inputs)
        return 1.0

    monkeypatch.setattr(measure, "microseconds", microseconds)
    chunk = bench.bench(SMALL[-1])
    right, nothing = (dataclasses.replace(chunk, ours={"sm90": x}) for x in (chunk.xla["reference"], lambda sets: sets))
    how = {"tuning": False, "others": True, "peers": None, "finished": set(), "stuck": lambda row: None}
    of_used = dataclasses.replace(right, in_place=False)
    (row,), (unwritten,), (used,) = (measure.rows(case, **how) for case in (right, nothing, of_used))
    assert row["us"] == 1.0 and row["reason"] is None
    assert unwritten["us"] is None and unwritten["reason"] == "wrong: the open blocks differ"
    assert used["us"] is None and "no roundings" in used["reason"]


@pytest.mark.parametrize("case", SMALL[:2], ids=lambda case: case.name)
def test_the_benchmark_allows_other_roundings_and_nothing_else(case):
    of_case = bench.bench(case)
    sets = jax.jit(of_case.inputs)(jax.random.key(0))
    exact, state = of_case.reference(sets)
    rows = of_case.xla["reference"](sets)[0]
    last = rows.shape[1] - 1
    code = int(np.argmin(np.abs(np.abs(np.asarray(rows.body[0, last], np.float32)) - 100)))
    scale = np.asarray(rows.scale[0, last, 0])
    scale = np.exp2(scale.astype(np.float32) - 127) if scale.dtype == np.uint8 else scale

    def wrong(rows, exact=exact):
        return bench.difference([rows, state], [exact, state])

    def other(rows, part, at, step):
        """Another number in row `last`: `step` bit patterns away."""
        leaf = np.array(getattr(rows, part))
        leaf.view(f"u{leaf.itemsize}")[0, last, at] += step
        return dataclasses.replace(rows, **{part: leaf})

    def between(share):
        """The unrounded number is `share` of the way from this code to the next."""
        first, then = (float(x.body[0, last, code]) for x in (rows, other(rows, "body", code, 1)))
        value = scale * ((1 - share) * first + share * then)
        return dataclasses.replace(exact, body=exact.body.at[0, last, code].set(value))

    assert wrong(rows) is None
    neighbour, second = (other(rows, "body", code, step) for step in (1, 2))
    assert wrong(neighbour).endswith(f"(rows: 1, first (0, {last}))") and wrong(second)
    assert wrong(rows, between(0.5)) is wrong(neighbour, between(0.5)) is None and wrong(second, between(0.5))
    assert wrong(rows, between(0.499)) is None and wrong(neighbour, between(0.499))
    assert wrong(neighbour, between(0.501)) is None and wrong(rows, between(0.501))
    assert "of the scale" in wrong(other(rows, "scale", 0, 1))
    for part in ("body", "scale"):  # where nothing was to be written
        leaf = np.array(getattr(rows, part))
        leaf.view(f"u{leaf.itemsize}")[1, 3, 0] = 1
        assert "(1, 3)" in wrong(dataclasses.replace(rows, **{part: leaf}))
    if rows.tail is not None:
        assert "of the tail" in wrong(other(rows, "tail", 3, 1))

"""Both forms of sparse attention against a float64 loop over single entries, with NaN in every slot not to be read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quant import paged
from pallas_kernels.rotary import Rotation, rotation, turn
from pallas_kernels.row_format import entry_format
from pallas_kernels.sparse_attention import sparse_attention, sparse_attention_prefill
from tests.kernels.compiled import encode_rows

SCALE = 0.3
HEADS, WIDTH = 2, 8  # H, K
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}
SINKS = {
    "none": None,
    "finite": np.array([0.7, -1.5], np.float32),
    "minus infinity": np.full(HEADS, -np.inf, np.float32),
    "infinity": np.full(HEADS, np.inf, np.float32),
}

decode = jax.jit(functools.partial(sparse_attention, scale=SCALE))
prefill = functools.partial(jax.jit, static_argnames="width")(
    functools.partial(sparse_attention_prefill, scale=SCALE),
)


def attend(q, entries, sink):
    """One query [H, K] over entries [n, K], in one softmax with the sink: (out [H, K], lse [H]) in float64."""
    entries = np.asarray(entries, np.float64).reshape(-1, q.shape[-1])
    logits = q.astype(np.float64) @ entries.T * SCALE
    with np.errstate(divide="ignore"):
        lse = np.log(np.exp(logits).sum(axis=-1))
    denominator = np.exp(lse) if sink is None else np.exp(lse) + np.exp(sink.astype(np.float64))
    shares = np.where(np.isinf(denominator), 0, 1 / np.where(denominator == 0, 1, denominator))
    return (np.exp(logits) * shares[:, None]) @ entries, lse


def attend_each(q, lists, sink):
    """`attend` for q [B, T, H, K] and lists[b][t] of entries."""
    pairs = [[attend(q[b, t], lists[b][t], sink) for t in range(q.shape[1])] for b in range(q.shape[0])]
    return tuple(np.array([[pair[part] for pair in row] for row in pairs]) for part in (0, 1))


def assert_close(got, want):
    for part, expected in zip(got, want, strict=True):
        np.testing.assert_allclose(part, expected, **TOLERANCE)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_decode_reads_exactly_the_named_entries():
    """One query a row, so that whatever it does not name, or names behind its count, can be NaN."""
    rng = np.random.default_rng(0)
    rows, slots, capacity, k = 8, 10, 7, 5
    q, window, compressed = (
        normal(1, rows, 1, HEADS, WIDTH),
        normal(2, rows, slots, WIDTH),
        normal(3, rows, capacity, WIDTH),
    )
    window_index = rng.integers(-1, slots, (rows, 1, 4)).astype(np.int32)
    index = rng.integers(-1, capacity, (rows, 1, k)).astype(np.int32)
    count = np.array([5, 0, 1, 2, 3, 4, 9, 5], np.int32)[:, None]
    window_index[0], index[0] = -1, -1  # nothing at all
    window_index[1] = -1  # nothing but what lies behind a count of 0
    window_index[2], index[2, 0, 0] = -1, 6
    window_index[3] = 3  # the same slot four times: as often as it is named
    index[4] = [[2, 2, 5, -1, 10**9]]  # a duplicate; behind the count an index that is no entry
    used_window = [list(window_index[b, 0][window_index[b, 0] >= 0]) for b in range(rows)]
    used = [[i for i in index[b, 0, : count[b, 0]] if i >= 0] for b in range(rows)]
    for b in range(rows):
        window[b, [s for s in range(slots) if s not in used_window[b]]] = np.nan
        compressed[b, [c for c in range(capacity) if c not in used[b]]] = np.nan
    lists = [[np.concatenate([window[b, used_window[b]], compressed[b, used[b]]])] for b in range(rows)]
    for sink in SINKS.values():
        out, lse = decode(q, window, window_index, compressed, index, count, sink)
        assert out.dtype == np.float32 and lse.dtype == np.float32
        assert_close((out, lse), attend_each(q, lists, sink))
        assert np.all(out[0] == 0) and np.all(np.isneginf(lse[0])), "no entry: output 0, lse -inf"
        assert np.all(out[1] == 0)
    assert np.all(decode(q, window, window_index, compressed, index, count, SINKS["infinity"])[0] == 0)


def test_decode_turns_its_output():
    """By the token's own rotation, all heads alike, before the output is rounded."""
    q, window = normal(1, 2, 3, HEADS, WIDTH), normal(2, 2, 5, WIDTH)
    index = np.tile(np.arange(5, dtype=np.int32), (2, 3, 1))
    args = window, index, None, None, None, None
    by = rotation(jnp.arange(6).reshape(2, 3), jnp.array([1.0, 0.3]))
    want, _ = decode(q, *args)
    got, _ = decode(q, *args, rotation=by)
    np.testing.assert_allclose(got, jax.jit(turn)(want, by.shared(-2)), atol=1e-6)
    assert not np.allclose(got[..., -4:], want[..., -4:])


def test_decode_over_the_first_entries_in_order():
    """Without an index the count alone says what a query sees."""
    q, window, compressed = normal(1, 5, 2, HEADS, WIDTH), normal(2, 5, 4, WIDTH), normal(3, 5, 6, WIDTH)
    window_index = np.tile(np.array([0, -1, 2], np.int32), (5, 2, 1))
    count = np.array([[0, 0], [0, 1], [1, 2], [5, 6], [3, 3]], np.int32)
    for b in range(5):
        compressed[b, count[b].max() :] = np.nan
    window[:, [1, 3]] = np.nan
    lists = [[np.concatenate([window[b, [0, 2]], compressed[b, : count[b, t]]]) for t in range(2)] for b in range(5)]
    sink = SINKS["finite"]
    assert_close(decode(q, window, window_index, compressed, None, count, sink), attend_each(q, lists, sink))


def band_case(seed, tokens, rows, width, starts):
    """Queries and a band whose rows of positions below 0 are NaN, and what each query sees of it."""
    q, band = normal(seed, len(starts), tokens, HEADS, WIDTH), normal(seed + 1, len(starts), rows, WIDTH)
    lists = []
    for b, start in enumerate(starts):
        position = start + np.arange(rows) - (rows - tokens)
        band[b, position < 0] = np.nan
        here = start + np.arange(tokens)
        lists.append([band[b, (position >= 0) & (position <= t) & (position > t - width)] for t in here])
    return q, band, np.array(starts, np.int32), lists


BANDS = {  # tokens, rows of the band, width, start of each row
    "one token": (1, 1, 1, (0, 9)),
    "width 1": (6, 9, 1, (0, 2)),
    "history shorter than the window": (6, 9, 8, (0, 2, 3)),
    "history as long as the window": (6, 13, 8, (0, 7, 100)),
    "history longer than the window": (6, 20, 8, (0, 14, 100)),
    "window larger than the band": (6, 9, 50, (0, 3, 47)),
    "several blocks": (300, 310, 7, (0, 10, 400)),
    "several blocks, wide window": (129, 390, 132, (0, 260)),
    "several blocks, history shorter than the window": (300, 303, 8, (0, 3, 47)),
    "one block behind a long history": (5, 300, 8, (0, 2, 295)),
}


@pytest.mark.parametrize("case", BANDS)
def test_the_band(case):
    """Positions, window edges and blocking; rows of positions below 0 hold NaN."""
    tokens, rows, width, starts = BANDS[case]
    q, band, start, lists = band_case(10, tokens, rows, width, starts)
    sink = SINKS["finite"]
    assert_close(prefill(q, band, start, None, None, None, sink, width=width), attend_each(q, lists, sink))


def selection_case(queries=12):
    """A band of one row and 9 compressed entries, of which each query names its own; NaN where none may look."""
    q, band, start, lists = band_case(20, queries, queries + 3, 4, (0, 3))
    compressed, index = normal(30, 2, 9, WIDTH), np.full((2, queries, 4), -1, np.int32)
    rng = np.random.default_rng(31)
    count = rng.integers(0, 6, (2, queries)).astype(np.int32)  # 5 is more than there are
    count[0, 5] = 0
    index[:] = np.argsort(rng.random((2, queries, 8)), axis=-1)[..., :4]  # entry 8 is never named
    index[1, 2], index[0, 3, 1] = -1, -1
    named = [[[i for i in index[b, t, : count[b, t]] if i >= 0] for t in range(queries)] for b in range(2)]
    for b in range(2):
        unread = sorted(set(range(9)) - {i for row in named[b] for i in row})
        compressed[b, unread] = np.nan
    index[:, :, 3] = np.where(count <= 3, 10**9, index[:, :, 3])  # absurd, but behind the count
    lists = [[np.concatenate([lists[b][t], compressed[b, named[b][t]]]) for t in range(queries)] for b in range(2)]
    return q, band, start, compressed, index, count, lists


@pytest.mark.parametrize("sink", SINKS)
def test_prefill_reads_exactly_the_selected_entries(sink):
    q, band, start, compressed, index, count, lists = selection_case()
    sink = SINKS[sink]
    assert_close(prefill(q, band, start, compressed, index, count, sink, width=4), attend_each(q, lists, sink))


def test_both_forms_agree_on_the_same_data():
    q, band, start, compressed, index, count, lists = selection_case()
    rows = band.shape[1]
    position = start[:, None] + np.arange(q.shape[1])[None]
    first = start[:, None] - (rows - q.shape[1])  # position of the band's first row
    window_position = position[..., None] - 3 + np.arange(4)
    window_index = np.where(window_position >= 0, window_position - first[..., None], -1).astype(np.int32)
    for sink in SINKS.values():
        want = prefill(q, band, start, compressed, index, count, sink, width=4)
        for b in range(2):  # one query a row: each has its own band of NaN then
            copies = [np.repeat(x[b : b + 1], q.shape[1], axis=0) for x in (band, compressed)]
            got = decode(
                q[b][:, None],
                copies[0],
                window_index[b][:, None],
                copies[1],
                index[b][:, None],
                count[b][:, None],
                sink,
            )
            assert_close((got[0][:, 0], got[1][:, 0]), (want[0][b], want[1][b]))


def test_the_log_sum_exp_is_natural_and_without_the_sink():
    q, band, start, compressed, index, count, _ = selection_case()
    results = [prefill(q, band, start, compressed, index, count, sink, width=4) for sink in SINKS.values()]
    for _, lse in results[1:]:
        np.testing.assert_array_equal(lse, results[0][1])
    one = decode(q[:, :1], band[:, -1:], np.zeros((2, 1, 1), np.int32), None, None, None, None)
    np.testing.assert_allclose(one[1], np.einsum("bthk,bk->bth", q[:, :1], band[:, -1]) * SCALE, **TOLERANCE)


def test_disjoint_halves_merge_by_their_log_sum_exp():
    """What lets several devices, or a split kernel, share one row: the sink enters once, at the end."""
    q, window, compressed = normal(1, 3, 2, HEADS, WIDTH), normal(2, 3, 4, WIDTH), normal(3, 3, 6, WIDTH)
    window_index = np.tile(np.array([0, 1, 2, 3], np.int32), (3, 2, 1))
    index = np.tile(np.array([5, 0, 3, 2], np.int32), (3, 2, 1))
    index[0] = -1  # this row's second half is empty: weight 0, no NaN
    nothing = np.full_like(index, -1)
    sink = SINKS["finite"]
    first = decode(q, window, window_index, compressed, nothing, None, None)
    second = decode(q, window, nothing, compressed, index, None, None)
    lse = np.logaddexp(first[1], second[1])
    merged = sum(np.exp(part_lse - lse)[..., None] * out for out, part_lse in (first, second))
    merged = merged / (1 + np.exp(sink - lse))[..., None]
    assert_close((merged, lse), decode(q, window, window_index, compressed, index, None, sink))


@pytest.mark.parametrize("sink", ["finite", "infinity", "minus infinity"])
def test_gradients_of_prefill_are_those_of_the_definition(sink):
    """Along a random direction, against float64 differences; nothing flows to what is not read, and nothing is NaN."""
    q, band, start, compressed, index, count, _ = selection_case()
    index[0, 0], band[0, 0:4] = -1, np.nan  # row 0, query 0: its only row is made invisible below
    sink = SINKS[sink]
    r_out, r_lse = normal(40, *q.shape), normal(41, *q.shape[:3])
    gradients = gradient(q, band, compressed, sink, index, count, r_out, r_lse)
    assert all(np.isfinite(g).all() for g in gradients)
    assert not np.any(gradients[0][0, 0]) and not np.any(gradients[1][0, :4]) and not np.any(gradients[2][:, 8])

    direction = [normal(50 + i, *g.shape) for i, g in enumerate(gradients)]
    here, step = (q, band, compressed, sink), 1e-4

    def moved(sign):
        at = [
            x if i >= len(direction) else x + sign * step * direction[i].astype(np.float64) for i, x in enumerate(here)
        ]
        return reference_total(*at, index, count, r_out, r_lse)

    slope = (moved(1) - moved(-1)) / (2 * step)
    got = sum(np.vdot(g.astype(np.float64), d) for g, d in zip(map(np.asarray, gradients), direction, strict=True))
    np.testing.assert_allclose(got, slope, rtol=1e-4)


BARE = np.array([-1, 3], np.int32)  # starts: a query at position -1 sees nothing


@jax.jit
@functools.partial(jax.grad, argnums=(0, 1, 2, 3))
def gradient(q, band, compressed, sink, index, count, r_out, r_lse):
    out, lse = prefill(q, band, BARE, compressed, index, count, sink, width=4)
    return jnp.sum(out * r_out) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0) * r_lse)


def reference_total(q, band, compressed, sink, index, count, r_out, r_lse):
    total = 0.0
    rows = band.shape[1] - q.shape[1]
    for b in range(q.shape[0]):
        position = BARE[b] + np.arange(band.shape[1]) - rows
        for t in range(q.shape[1]):
            here = BARE[b] + t
            seen = (position >= 0) & (position <= here) & (position > here - 4)
            named = [i for i in index[b, t, : count[b, t]] if i >= 0]
            out, lse = attend(q[b, t], np.concatenate([band[b, seen], compressed[b, named]]), sink)
            total += np.sum(out * r_out[b, t]) + np.sum(np.where(np.isfinite(lse), lse, 0) * r_lse[b, t])
    return total


def test_gradients_of_decode_do_not_touch_what_is_not_read():
    q, window, compressed = normal(1, 2, 1, HEADS, WIDTH), normal(2, 2, 4, WIDTH), normal(3, 2, 5, WIDTH)
    window_index = np.array([[[0, 2, -1]], [[-1, -1, -1]]], np.int32)
    index, count = np.array([[[4, 1, 0]], [[3, 3, 3]]], np.int32), np.array([[2], [0]], np.int32)
    window[0, [1, 3]] = window[1] = compressed[0, [0, 2, 3]] = compressed[1] = np.nan

    def total(q, window, compressed, sink):
        out, lse = decode(q, window, window_index, compressed, index, count, sink)
        return jnp.sum(out**2) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0))

    gradients = jax.jit(jax.grad(total, (0, 1, 2, 3)))(q, window, compressed, SINKS["finite"])
    assert all(np.isfinite(g).all() for g in gradients)
    read = [np.any(g, axis=-1) for g in gradients[1:3]]
    np.testing.assert_array_equal(read[0], [[True, False, True, False], [False] * 4])
    np.testing.assert_array_equal(read[1], [[False, True, False, False, True], [False] * 5])


def test_operands_that_do_not_fit_are_refused():
    """By name: kernels read by address."""
    entries = encode_rows(jnp.zeros((2, 8, 64)), entry_format("fp8", 16))
    q, index = jnp.zeros((2, 1, 4, 64)), jnp.zeros((2, 1, 3), jnp.int32)
    pages = paged(entries, 4)

    def attend(entries, turned=None):
        return sparse_attention(q, entries, index, None, None, None, None, scale=1.0, rotation=turned)

    for shape in ((1, 1, 8), (2, 2, 8), (2, 1, 33)):
        with pytest.raises((ValueError, TypeError), match="rotation|turned"):
            attend(entries, Rotation(jnp.ones(shape), jnp.ones(shape)))
    with pytest.raises(ValueError, match=r"window entries: the pool is uint8 of pages \(\d+,\); 4 rows of 64"):
        attend(dataclasses.replace(pages, pool=pages.pool[:, :-1]))
    with pytest.raises(ValueError, match="the table is int16"):
        attend(dataclasses.replace(pages, table=pages.table.astype(jnp.int16)))
    with pytest.raises(ValueError, match="a band of 3 rows for 4 queries"):
        start = jnp.zeros(2, jnp.int32)
        prefill = functools.partial(sparse_attention_prefill, jnp.zeros((2, 4, 4, 64)), scale=1.0)
        prefill(jnp.zeros((2, 3, 64)), start, None, None, None, None, width=8)


def test_a_narrow_cache_under_wide_queries():
    """float32 queries over bfloat16 entries: promoted, not refused and not rounded down."""
    q, window, compressed = normal(1, 1, 1, HEADS, WIDTH), normal(2, 1, 3, WIDTH), normal(3, 1, 4, WIDTH)
    window, compressed = (jnp.asarray(x, jnp.bfloat16) for x in (window, compressed))
    entries = np.concatenate([np.asarray(x[0], np.float32) for x in (window, compressed)])
    want = attend_each(q, [[entries]], None)
    window_index, index = np.array([[[0, 1, 2]]], np.int32), np.array([[[0, 1, 2, 3]]], np.int32)
    all_of_them = np.full((1, 1), 4, np.int32)
    for got in (
        decode(q, window, window_index, compressed, index, all_of_them, None),
        decode(q, window, window_index, compressed, None, all_of_them, None),
        prefill(q, window, np.array([2], np.int32), compressed, index, all_of_them, None, width=3),
    ):
        assert got[0].dtype == np.float32
        assert_close(got, want)

"""Compression against its definition over a whole sequence, and against itself under every way to cut the sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.compress import CompressorState, Entries, compress, initial_state

EPS, WIDTH = 1e-5, 6  # K; its last four channels are rotary
TOKENS, CHUNK = 21, 9
FREQUENCIES = np.array([0.9, 0.05], np.float32)
KINDS = {"csa": (4, True), "hca": (3, False), "csa:2": (2, True), "hca:16": (16, False)}  # ratio, overlapping

run = functools.partial(jax.jit, static_argnames="norm_eps")(compress)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def problem(kind):
    """kv, gate [2, TOKENS, w], ape, norm weight, and the entries they define."""
    ratio, overlap = KINDS[kind]
    width = WIDTH * (2 if overlap else 1)
    kv, gate, ape, weight = (
        normal(0, 2, TOKENS, width),
        normal(1, 2, TOKENS, width),
        normal(2, ratio, width),
        normal(3, WIDTH),
    )
    entries = np.stack([definition(kv[b], gate[b], ape, weight, ratio, overlap) for b in range(2)])
    return kv, gate, ape, weight, entries


def definition(kv, gate, ape, weight, ratio, overlap):
    """Every finished entry [n, K] of one sequence, in float64."""
    kv, gate = kv.astype(np.float64), gate.astype(np.float64) + np.resize(ape, gate.shape)
    out = []
    for e in range(len(kv) // ratio):
        now = slice(e * ratio, (e + 1) * ratio)
        rows, logits = kv[now, -WIDTH:], gate[now, -WIDTH:]
        if overlap and e > 0:  # the FIRST half of the block before, the SECOND of this one
            before = slice((e - 1) * ratio, e * ratio)
            rows, logits = np.vstack([kv[before, :WIDTH], rows]), np.vstack([gate[before, :WIDTH], logits])
        share = np.exp(logits) / np.exp(logits).sum(axis=0)
        pooled = (share * rows).sum(axis=0)
        normed = pooled / np.sqrt(np.mean(pooled**2) + EPS) * weight
        angle = e * ratio * FREQUENCIES.astype(np.float64)  # the position of the block's first token, not e
        even, odd = normed[2::2], normed[3::2]
        turned = np.stack([even * np.cos(angle) - odd * np.sin(angle), even * np.sin(angle) + odd * np.cos(angle)], -1)
        out.append(np.concatenate([normed[:2], turned.reshape(-1)]))
    return np.array(out).reshape(-1, WIDTH)


def call(kind, kv, gate, state, start, count) -> tuple[Entries, CompressorState | None]:
    _, _, ape, weight, _ = problem(kind)
    return run(kv, gate, state, jnp.int32(start), jnp.int32(count), ape, weight, FREQUENCIES, norm_eps=EPS)


def empty(kind):
    ratio, overlap = KINDS[kind]
    return initial_state(2, ratio, WIDTH * (2 if overlap else 1), overlap)


def assert_entries(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_sequence(kind):
    kv, gate, _, _, want = problem(kind)
    entries, state = call(kind, kv, gate, None, [0, 0], [TOKENS, TOKENS])
    assert state is None
    assert entries.first.tolist() == [0, 0] and entries.closed.tolist() == [want.shape[1]] * 2
    assert_entries(entries.values, want)


def chunks(kind, sizes):
    """Entries [2, n, K] after chunks of these sizes, NaN-padded to one shape, and the state; row 1 lags one chunk."""
    kv, gate, _, _, want = problem(kind)
    state = empty(kind)
    got = np.full_like(want, np.nan, dtype=np.float32)
    begin = [0, 0]
    for step in range(len(sizes) + 1):
        count = [sizes[step] if step < len(sizes) else 0, sizes[step - 1] if step else 0]
        rows = np.full((2, 2, CHUNK, kv.shape[-1]), np.nan, np.float32)
        for b in range(2):
            part = slice(begin[b], begin[b] + count[b])
            rows[0, b, : count[b]], rows[1, b, : count[b]] = kv[b, part], gate[b, part]
        entries, state = call(kind, *rows, state, begin, count)
        for b in range(2):
            first, closed = int(entries.first[b]), int(entries.closed[b])
            got[b, first : first + closed] = entries.values[b, :closed]
            begin[b] += count[b]
    return got, state


@pytest.mark.parametrize("kind", ["csa", "hca"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_cut_gives_the_same_entries_and_state(kind, data):
    """Rows behind the count hold NaN; a chunk may be empty, and the two rows are never at the same position."""
    sizes, left = [], TOKENS
    while left:
        sizes.append(data.draw(st.integers(0, min(CHUNK, left)) if len(sizes) < 12 else st.just(min(CHUNK, left))))
        left -= sizes[-1]
    got, state = chunks(kind, sizes)
    kv, gate, _, _, want = problem(kind)
    assert_entries(got, want)
    ratio, overlap = KINDS[kind]
    for ring, rows in ((state.kv, kv), (state.gate, gate)):  # what later tokens may still look back on
        for position in range(TOKENS // ratio * ratio - (ratio if overlap else 0), TOKENS):
            np.testing.assert_array_equal(ring[:, position % ring.shape[1]], rows[:, position])


@pytest.mark.parametrize("kind", ["csa:2", "hca:16"])
def test_one_token_at_a_time(kind):
    kv, gate, _, _, want = problem(kind)
    state, got = empty(kind), []
    for t in range(TOKENS):
        entries, state = call(kind, kv[:, t : t + 1], gate[:, t : t + 1], state, [t, t], [1, 1])
        if int(entries.closed[0]):
            assert (t + 1) % KINDS[kind][0] == 0 and int(entries.first[0]) == len(got)
            got.append(entries.values[:, 0])
    assert_entries(np.stack(got, axis=1) if got else np.zeros((2, 0, WIDTH)), want)


@pytest.mark.parametrize("kind", ["csa", "hca"])
def test_drafts_are_taken_back_by_the_position_alone(kind):
    """From every position: four drafted tokens, of which none to three are kept, then other tokens."""
    kv, gate, _, _, want = problem(kind)
    wrong = 100 * normal(7, *kv.shape)
    for begin in range(TOKENS - 4):
        state = empty(kind)
        for t in range(0, begin, 4):
            part = slice(t, t + 4)
            n = min(4, begin - t)
            _, state = call(kind, kv[:, part], gate[:, part], state, [t, t], [n, n])
        for kept in range(4):
            drafted = np.concatenate([kv[:, begin : begin + kept], wrong[:, begin + kept : begin + 4]], axis=1)
            _, after = call(kind, drafted, gate[:, begin : begin + 4], state, [begin] * 2, [4, 4])
            at = begin + kept
            rest = slice(at, at + 4)
            count = min(4, TOKENS - at)
            fed = [np.pad(x[:, rest], ((0, 0), (0, 4 - count), (0, 0))) for x in (kv, gate)]
            entries, _ = call(kind, *fed, after, [at, at], [count, count])
            first, closed = int(entries.first[0]), int(entries.closed[0])
            assert_entries(entries.values[:, :closed], want[:, first : first + closed])


def test_the_block_before_the_first_is_absent():
    """Entry 0 of an overlapping layer pools m rows, not m rows and m zeros, and ignores what a reused state holds."""
    kv, gate, _, _, want = problem("csa")
    stale = CompressorState(*(jnp.full_like(x, jnp.nan) for x in empty("csa")))
    entries, _ = call("csa", kv[:, :CHUNK], gate[:, :CHUNK], stale, [0, 0], [CHUNK] * 2)
    assert_entries(entries.values[:, :2], want[:, :2])


def test_the_gate_sees_the_place_in_the_block():
    """ape[position % m], also for a chunk that starts inside a block."""
    kv, gate, ape, weight, want = problem("hca")
    moved = call("hca", kv, gate, None, [0, 0], [TOKENS, TOKENS])[0].values
    shifted = run(
        kv, gate, None, jnp.zeros(2, jnp.int32), jnp.full(2, TOKENS), np.roll(ape, 1, axis=0), weight, FREQUENCIES,
        norm_eps=EPS,
    )[0].values  # fmt: skip
    assert_entries(moved, want)
    assert np.abs(np.asarray(shifted) - want).max() > 0.1


def test_pooling_is_float32_of_bfloat16_rows():
    kv, gate, _, _, _ = problem("csa")
    low = [jnp.asarray(x, jnp.bfloat16) for x in (kv, gate)]
    got = call("csa", *low, None, [0, 0], [TOKENS] * 2)[0].values
    want = call("csa", *(x.astype(jnp.float32) for x in low), None, [0, 0], [TOKENS] * 2)[0].values
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", ["csa", "hca"])
def test_gradients_are_finite_and_reach_what_is_pooled(kind):
    kv, gate, ape, weight, _ = problem(kind)

    def total(kv, gate, ape):
        start, count = jnp.zeros(2, jnp.int32), jnp.full(2, TOKENS)
        return jnp.sum(run(kv, gate, None, start, count, ape, weight, FREQUENCIES, norm_eps=EPS)[0].values ** 3)

    gradients = jax.jit(jax.grad(total, (0, 1, 2)))(kv, gate, ape)
    assert all(np.isfinite(g).all() for g in gradients)
    ratio, overlap = KINDS[kind]
    used = TOKENS // ratio * ratio
    assert np.all(np.any(gradients[0][:, :used, -WIDTH:], axis=-1)) and not np.any(gradients[0][:, used:])
    if overlap:  # the last block's first half waits for a block that never comes
        pooled = np.any(gradients[0][..., :WIDTH], axis=-1)
        assert np.all(pooled[:, : used - ratio]) and not np.any(pooled[:, used - ratio :])

"""Rows of a batch are strangers: nothing of one reaches another, and what is padding, overflow or a draft stays out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

BATCH, TOKENS, CHUNK, STEP = 4, 264, 200, 4  # as in test_three_ways, whose programs these tests share
ALONE = 2e-5  # another batch size sums in another order; the logits' standard deviation is about 1


@pytest.fixture(scope="module")
def model(ways):
    return ways.model_of("tiny")


@pytest.fixture(scope="module")
def ids(ways, model):
    return ways.random_ids(model, BATCH, TOKENS)


@pytest.fixture(scope="module")
def full(ways, model, ids):
    return np.asarray(ways.forward(model, ids))


def prompt(ways, model, ids, lengths):
    """(logits, cache) after prompts of these lengths."""
    zeros = np.zeros(len(lengths), int)
    return ways.feed(model, ids, zeros, np.array(lengths), CHUNK, ways.empty(model, len(lengths), TOKENS))


def row(tree, b):
    """What a cache holds for one sequence."""
    return [np.asarray(leaf[b]) for leaf in jax.tree.leaves(tree)]


def assert_equal_rows(left, right):
    for mine, theirs in zip(left, right, strict=True):
        np.testing.assert_array_equal(mine, theirs)


LENGTHS = [5, 64, 1, 187]


def test_each_row_is_as_it_would_be_alone(ways, model, ids):
    """Prompts of very different lengths, then a step of one to four tokens each: every logit, not the last alone."""
    logits, cache = prompt(ways, model, ids, LENGTHS)
    counts = np.array([4, 1, 3, 2])
    stepped, _ = ways.feed(model, ids, LENGTHS, counts, STEP, cache)
    for b, length in enumerate(LENGTHS):
        mine, own = prompt(ways, model, ids[b : b + 1], [length])
        np.testing.assert_allclose(logits[b, :length], mine[0, :length], atol=ALONE)
        mine, _ = ways.feed(model, ids[b : b + 1], [length], counts[b : b + 1], CHUNK, own)
        np.testing.assert_allclose(stepped[b, : counts[b]], mine[0, : counts[b]], atol=5 * ALONE)


def test_strangers_and_padding_never_matter(ways, model, ids):
    """Row 1 bit for bit, whatever its neighbours are and whatever lies behind its own end, NaN included."""
    vocab = model.config.vocab_size
    want, cache = prompt(ways, model, ids, LENGTHS)
    again, _ = ways.feed(model, ids, LENGTHS, [1] * BATCH, STEP, cache)
    for pad in (0, -1, vocab, 2**31 - 1):
        other = ids.copy()
        other[[0, 2, 3]] = pad
        zeros, counts = np.zeros(BATCH, int), np.array([150, LENGTHS[1], 7, 0])
        got, poisoned = ways.feed(model, other, zeros, counts, CHUNK, ways.empty(model, BATCH, TOKENS), pad=pad)
        np.testing.assert_array_equal(got[1, : LENGTHS[1]], want[1, : LENGTHS[1]])
        assert_equal_rows(row(poisoned, 1), row(cache, 1))
        stepped, _ = ways.feed(model, other, poisoned.length, [1] * BATCH, STEP, poisoned, pad=pad)
        np.testing.assert_array_equal(stepped[1, 0], again[1, 0])


@pytest.mark.parametrize("width", [STEP, CHUNK], ids=["step", "prefill"])
def test_a_count_of_zero_leaves_the_row_as_it_was(ways, model, ids, width):
    """Bit for bit, with ids that would poison it; at a fresh row, inside a block and at its end."""
    lengths = [0, 7, 8, 150]
    _, cache = prompt(ways, model, ids, lengths)
    for still in range(BATCH):
        counts = np.where(np.arange(BATCH) == still, 0, 3)
        _, after = ways.feed(model, ids, np.array(lengths), counts, width, cache, pad=-1)
        assert_equal_rows(row(after, still), row(cache, still))
        assert after.length.tolist() == (np.array(lengths) + counts).tolist()


def test_permuting_the_batch_permutes_the_results(ways, model, ids):
    order = [2, 0, 3, 1]
    logits, cache = prompt(ways, model, ids, LENGTHS)
    mixed, mixed_cache = prompt(ways, model, ids[order], [LENGTHS[b] for b in order])
    np.testing.assert_allclose(mixed[:, :1], logits[order, :1], atol=ALONE)
    for at, b in enumerate(order):
        np.testing.assert_allclose(mixed[at, : LENGTHS[b]], logits[b, : LENGTHS[b]], atol=ALONE)
        for mine, theirs in zip(row(mixed_cache, at), row(cache, b), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=ALONE)


def test_beyond_the_capacity_is_nan_and_before_it_is_right(ways, model, ids, full):
    """A step that crosses the end: right tokens up to it, NaN behind it, and neighbours that still have room go on."""
    lengths = np.array([TOKENS - 2, 30, TOKENS - STEP, TOKENS])
    cache = roomy(ways, model, ids, lengths)
    more = np.concatenate([ids, ids[:, :STEP]], axis=1)
    logits, after = ways.feed(model, more, lengths, [STEP] * BATCH, STEP, cache)
    assert np.isnan(logits[0, 2:]).all() and np.isnan(logits[3]).all()
    for b, valid in ((0, 2), (1, 4), (2, 4)):
        np.testing.assert_allclose(logits[b, :valid], full[b, lengths[b] : lengths[b] + valid], atol=2e-4)
    logits, _ = ways.feed(model, more, [0] * BATCH, [1] * BATCH, STEP, after)
    assert np.isnan(logits[[0, 2, 3], 0]).all() and np.isfinite(logits[1, 0]).all()
    # Drafts that crossed the end are taken back like any others.
    back = dataclasses.replace(after, length=jnp.asarray(lengths, jnp.int32))
    logits, _ = ways.feed(model, more, lengths, [2, 1, 3, 0], STEP, back)
    np.testing.assert_allclose(logits[0, :2], full[0, -2:], atol=2e-4)
    np.testing.assert_allclose(logits[2, :3], full[2, -STEP : -STEP + 3], atol=2e-4)


def roomy(ways, model, ids, lengths):
    """A cache with lengths up to its capacity, which takes more than one chunk."""
    _, cache = prompt(ways, model, ids, np.minimum(lengths, CHUNK))
    _, cache = ways.feed(model, ids, np.minimum(lengths, CHUNK), np.maximum(lengths - CHUNK, 0), CHUNK, cache)
    assert cache.length.tolist() == lengths.tolist()
    return cache


@pytest.mark.parametrize("wrong", [-1, "vocabulary", 2**31 - 1])
def test_an_id_out_of_range_poisons_its_own_row_only(ways, model, ids, wrong):
    """A jitted step cannot raise: NaN from that token on, and never another token's logits."""
    wrong = model.config.vocab_size if wrong == "vocabulary" else wrong
    _, cache = prompt(ways, model, ids, LENGTHS)
    tokens = np.array([ids[b, length : length + STEP] for b, length in enumerate(LENGTHS)])
    every = np.full(BATCH, STEP, np.int32)
    clean, _ = ways.extend(model, tokens, every, cache)
    bad = tokens.copy()
    bad[1, 2] = wrong
    logits, after = ways.extend(model, bad, every, cache)
    logits, clean = np.asarray(logits), np.asarray(clean)
    assert np.isnan(logits[1, 2:]).all()
    np.testing.assert_array_equal(logits[1, :2], clean[1, :2])
    np.testing.assert_array_equal(logits[[0, 2, 3]], clean[[0, 2, 3]])
    logits, _ = ways.extend(model, tokens, every, after)
    assert np.isnan(logits[1]).all() and np.isfinite(np.asarray(logits)[[0, 2, 3]]).all()


def test_steps_of_one_to_four_tokens_give_the_same(ways, model, ids, full):
    """Each row at its own pace: the ring and the open blocks meet every offset, two windows on."""
    lengths, cache = np.zeros(BATCH, int), ways.empty(model, BATCH, TOKENS)
    rng = np.random.default_rng(0)
    while lengths.min() < 40:
        counts = rng.integers(0, STEP + 1, BATCH)
        logits, cache = ways.feed(model, ids, lengths, counts, STEP, cache, pad=-1)
        for b, count in enumerate(counts):
            np.testing.assert_allclose(logits[b, :count], full[b, lengths[b] : lengths[b] + count], atol=2e-4)
        lengths = lengths + counts


def test_rejected_drafts_leave_no_trace(ways, model, ids, full):
    """From every position: a step of four drafts, none to three of them kept, the length set back, other tokens.

    That is all a speculative decoder does to the cache, and it must be as if the drafts had never been there.
    """
    lengths = np.array([0, 1, 2, 3]) + 5
    _, cache = prompt(ways, model, ids, lengths)
    rng, wrong = np.random.default_rng(0), ways.random_ids(model, BATCH, TOKENS, seed=2)
    while lengths.min() < 60:
        kept = rng.integers(0, STEP, BATCH)
        drafts = ids.copy()
        for b, n in enumerate(kept):
            drafts[b, lengths[b] + n :] = wrong[b, lengths[b] + n :]
        logits, drafted = ways.feed(model, drafts, lengths, [STEP] * BATCH, STEP, cache)
        for b, n in enumerate(kept):
            np.testing.assert_allclose(logits[b, :n], full[b, lengths[b] : lengths[b] + n], atol=2e-4)
        lengths = lengths + kept
        back = dataclasses.replace(drafted, length=jnp.asarray(lengths, jnp.int32))
        logits, cache = ways.feed(model, ids, lengths, [3] * BATCH, STEP, back)
        for b in range(BATCH):
            np.testing.assert_allclose(logits[b, :3], full[b, lengths[b] : lengths[b] + 3], atol=2e-4)
        lengths = lengths + 3


def test_drafts_are_rejected_across_a_block_that_they_closed(ways, model, ids, full):
    """The hard case alone: at the last tokens of a CSA and an HCA block, all four drafts are wrong."""
    at = np.array([5, 6, 7, 8])  # the ratios are 4 and 8: position 7 closes a block of each
    _, cache = prompt(ways, model, ids, at)
    wrong = ways.random_ids(model, BATCH, TOKENS, seed=2)
    _, drafted = ways.feed(model, wrong, at, [STEP] * BATCH, STEP, cache)
    back = dataclasses.replace(drafted, length=jnp.asarray(at, jnp.int32))
    for step in range(6):
        logits, back = ways.feed(model, ids, at + step, [1] * BATCH, STEP, back)
        np.testing.assert_allclose(logits[:, 0], full[range(BATCH), at + step], atol=2e-4)

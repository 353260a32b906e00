"""Measures of hand-made logits and selections."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4.evaluate.compare import Sums, common, compare, first_divergence

B, L, V, K, RATIO = 2, 16, 7, 2, 4
SCORED = np.ones((B, L), bool)


@pytest.fixture
def logits():
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, L, V)), jnp.float32)


def sums(logits, baseline, scored=SCORED, selected=(), other=(), targets=None):
    targets = np.zeros((B, L), np.int32) if targets is None else targets
    ratios = (RATIO,) * len(selected)
    found = compare(logits, selected, baseline, other, jnp.asarray(targets), jnp.asarray(scored), ratios=ratios)
    return Sums(*map(np.asarray, found))


def test_a_model_is_itself(logits):
    found = sums(logits, logits)
    np.testing.assert_array_equal(found.kl, 0)
    np.testing.assert_array_equal(found.agreed, L)
    np.testing.assert_array_equal(found.choices, 0)


def test_only_scored_targets_count(logits):
    scored, targets = SCORED.copy(), np.arange(B * L, dtype=np.int32).reshape(B, L) % V
    scored[1, 5:] = False
    found = sums(logits, -logits, scored, targets=targets)
    log = np.asarray(logits, np.float64) - np.log(np.exp(np.asarray(logits, np.float64)).sum(-1, keepdims=True))
    other = -np.asarray(logits, np.float64)
    other -= np.log(np.exp(other).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log, targets[..., None], axis=-1)[..., 0]
    divergence = (np.exp(other) * (other - log)).sum(-1)
    np.testing.assert_allclose(found.nats, (nats * scored).sum(1), rtol=1e-5)
    np.testing.assert_allclose(found.kl, (divergence * scored).sum(1), rtol=1e-5)
    np.testing.assert_array_equal(found.agreed, 0)  # what is most likely for one is least likely for the other


def test_overlap_counts_queries_that_choose():
    """With entries of 4 tokens and a top-2, the queries at 11 to 15 choose: they see 3 or 4 entries."""
    visible = (np.arange(L) + 1) // RATIO
    mine = np.where(np.arange(K) < visible[:, None], np.arange(K), -1)  # 0 and 1
    theirs = np.where(visible[:, None] > K, mine + [0, 1], mine)  # 0 and 2 where there is a choice
    one, other = (jnp.asarray(np.tile(x, (B, 1, 1)), jnp.int32) for x in (mine, theirs))
    scored = SCORED.copy()
    scored[1, -1] = False
    zeros = jnp.zeros((B, L, V), jnp.float32)
    found = sums(zeros, zeros, scored, (one, one), (one, other))
    np.testing.assert_array_equal(found.choices, [10, 8])  # two layers
    np.testing.assert_array_equal(found.overlap, [7.5, 6])  # all of the first's, half of the second's


def test_common_indices():
    one, other = jnp.asarray([[3, 1, -1, -1], [0, 1, 2, 3]]), jnp.asarray([[1, 2, -1, -1], [3, 2, 1, 0]])
    np.testing.assert_array_equal(common(one, other), [1, 4])


def test_batches_are_joined_without_what_fills_the_last(logits):
    part = sums(logits, logits)
    joined = Sums.joined([part, part], 3)
    assert joined.agreed.tolist() == [L] * 3


def test_first_divergence():
    baseline = np.array([[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    np.testing.assert_array_equal(first_divergence(np.array([[1, 2, 3], [9, 2, 3], [1, 2, 9]]), baseline), [3, 0, 2])

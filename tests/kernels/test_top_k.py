"""Top-k is exact: the highest scores, ties to the lower index, and -1 where there is nothing left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.top_k import top_k

ROWS, SIZE = 4, 11
choose = jax.jit(top_k, static_argnums=1)


def ranking(scores, k, count):
    """By sorting: -0 and +0 compare equal in Python, and the index settles ties."""
    best = sorted(range(min(count, len(scores))), key=lambda i: (-float(scores[i]), i))[:k]
    return best + [-1] * (min(k, len(scores)) - len(best))


def assert_ranked(scores, k, counts):
    got = choose(scores, k, jnp.asarray(counts, jnp.int32))
    assert got.dtype == jnp.int32
    want = [ranking(row, k, count) for row, count in zip(np.asarray(scores, np.float32), counts, strict=True)]
    np.testing.assert_array_equal(got, want)


FEW_VALUES = st.sampled_from([-np.inf, -2.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 3.0])


@pytest.mark.parametrize("k", [1, 4, SIZE])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    scores=st.lists(st.lists(FEW_VALUES, min_size=SIZE, max_size=SIZE), min_size=ROWS, max_size=ROWS),
    counts=st.lists(st.integers(0, SIZE + 2), min_size=ROWS, max_size=ROWS),
)
def test_ranks_as_sorting_does(k, scores, counts):
    scores = np.array(scores, np.float32)
    scores[np.abs(scores) < 1e-38] *= 0  # devices flush subnormals: keep their sign, a zero either way
    assert_ranked(scores, k, counts)


def test_counts_around_k():
    """0, 1, k, k + 1 visible scores; what lies behind them may be anything, NaN and infinity included."""
    k, counts = 3, [0, 1, 3, 4]
    scores = np.tile(np.array([1.0, 5.0, 5.0, 9.0, 2.0], np.float32), (ROWS, 1))
    for row, count in zip(scores, counts, strict=True):
        row[count:] = [np.nan, np.inf, np.nan, np.inf, np.nan][: len(row) - count]
    assert_ranked(scores, k, counts)


def test_k_beyond_the_number_of_scores_gives_them_all():
    scores = np.array([[0.0, -0.0, 1.0]], np.float32)
    assert choose(scores, 512, jnp.array([3])).tolist() == [[2, 0, 1]]
    assert choose(scores, 512, jnp.array([2])).tolist() == [[0, 1, -1]]


def test_visible_minus_infinity_comes_before_invisible():
    """An invisible entry is never named, even where every visible score is -inf."""
    scores = np.full((2, 6), -np.inf, np.float32)
    scores[:, 4:] = np.inf
    assert choose(scores, 4, jnp.array([3, 4])).tolist() == [[0, 1, 2, -1], [0, 1, 2, 3]]


def test_ties_among_thousands():
    """Equal scores in bfloat16, as an indexer makes them: any unstable sort would show here."""
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.integers(0, 7, (2, 3000)), jnp.bfloat16)
    assert_ranked(scores, 512, [3000, 1700])


def test_counts_of_other_rows_are_refused():
    with pytest.raises((ValueError, TypeError), match="counts"):
        top_k(jnp.zeros((2, 3, 4)), 2, jnp.zeros(3, jnp.int32))


def test_leading_axes_are_independent():
    scores = np.random.default_rng(1).integers(0, 3, (2, 3, 8)).astype(np.float32)
    counts = np.array([[8, 0, 3], [1, 2, 8]], np.int32)
    got = choose(scores, 4, jnp.asarray(counts))
    assert got.tolist() == [[ranking(scores[b, t], 4, counts[b, t]) for t in range(3)] for b in range(2)]

"""Indexer scores: a ReLU per head, then the weighted sum; entries a query cannot see may hold anything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.index_scores import index_scores
from pallas_kernels.top_k import top_k

score = jax.jit(index_scores)
select = jax.jit(lambda q, keys, weights, counts: top_k(index_scores(q, keys, weights), 2, counts))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_definition():
    """The ReLU is inside the sum over heads: weights of either sign, and one key that only a negative product sees."""
    q, keys, weights = normal(0, 2, 3, 4, 8), normal(1, 2, 5, 8), normal(2, 2, 3, 4)
    keys[0, 0] = -10 * q[0, 0].sum(axis=0)
    got = score(q, keys, weights)
    assert got.dtype == np.float32
    for b, t, c in np.ndindex(2, 3, 5):
        want = sum(weights[b, t, h] * max(0.0, float(q[b, t, h] @ keys[b, c])) for h in range(4))
        np.testing.assert_allclose(got[b, t, c], want, rtol=1e-4, atol=1e-4)


def test_operands_that_do_not_fit_are_refused():
    q, keys, weights = jnp.zeros((2, 1, 3, 8)), jnp.zeros((2, 5, 8)), jnp.zeros((2, 1, 3))
    counts = jnp.zeros((2, 1), jnp.int32)
    for changed, match in (
        ({"keys": keys[:1]}, "keys"),
        ({"weights": weights[:1]}, "weights"),
        ({"counts": counts[:1]}, "counts"),
    ):
        given = {"keys": keys, "weights": weights, "counts": counts} | changed
        with pytest.raises((ValueError, TypeError), match=match):
            index_scores(q, **given)


def test_invisible_keys_do_not_disturb_the_selection():
    """NaN keys behind the visible ones: their scores are garbage, the selection is not."""
    q, keys, weights = normal(0, 1, 3, 2, 8), normal(1, 1, 6, 8), np.abs(normal(2, 1, 3, 2))
    counts = np.array([[1, 3, 4]], np.int32)
    clean = select(q, keys, weights, counts)
    keys[:, 4:] = np.nan
    np.testing.assert_array_equal(select(q, keys, weights, counts), clean)

"""Sampling: greedy, restricted and drawn as often as the probabilities say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4.decoding.inputs import InputError
from dsv4.decoding.sample import Sampling, sample

LOGITS = jnp.log(jnp.array([[0.05, 0.4, 0.1, 0.3, 0.15]]))
DRAWS = 4000


choose = jax.jit(sample)


@jax.jit
def draws(sampling):
    keys = jax.random.split(jax.random.key(0), DRAWS)
    return jax.lax.map(lambda key: sample(LOGITS, key, sampling), keys)[:, 0]


def test_temperature_0_is_greedy_with_any_key():
    tokens = [choose(LOGITS, jax.random.key(i), Sampling()) for i in range(3)]
    assert [token.tolist() for token in tokens] == [[1]] * 3
    assert tokens[0].dtype == jnp.int32


def test_equal_logits_go_to_the_lower_id():
    logits = jnp.array([[0.0, 2.0, 2.0, 1.0]])
    assert choose(logits, jax.random.key(0), Sampling()).item() == 1
    for seed in range(5):  # top_k 1 cuts between them
        assert choose(logits, jax.random.key(seed), Sampling(1.0, top_k=1)).item() == 1


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), [0.05, 0.4, 0.1, 0.3, 0.15]),
        (Sampling(0.5), np.array([0.05, 0.4, 0.1, 0.3, 0.15]) ** 2 / 0.285),
        (Sampling(1.0, top_k=2), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(1.0, top_k=99), [0.05, 0.4, 0.1, 0.3, 0.15]),
        (Sampling(1.0, top_p=0.6), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(1.0, top_p=0.01), [0, 1, 0, 0, 0]),
        # top_p counts within the top_k: of 0.4 and 0.3, the first alone is 4/7.
        (Sampling(1.0, top_k=2, top_p=0.5), [0, 1, 0, 0, 0]),
    ],
)
def test_draws_follow_the_restricted_probabilities(sampling, expected):
    found = np.bincount(np.asarray(draws(sampling)), minlength=LOGITS.shape[1]) / DRAWS
    expected = np.asarray(expected)
    noise = np.sqrt(expected * (1 - expected) / DRAWS)
    assert (np.abs(found - expected) <= 5 * noise).all(), found


def test_rows_may_have_settings_of_their_own():
    logits = jnp.tile(LOGITS, (3, 1))
    sampling = Sampling(jnp.array([0.0, 1.0, 5.0]), jnp.array([0, 1, 0]), 1.0)
    drawn = np.stack([np.asarray(choose(logits, jax.random.key(i), sampling)) for i in range(20)])
    assert (drawn[:, :2] == 1).all()
    assert len(set(drawn[:, 2].tolist())) > 1


def test_settings_compile_nothing_again():
    choose(LOGITS, jax.random.key(0), Sampling())
    compiled = choose._cache_size()
    for sampling in (Sampling(0.7), Sampling(1.3, 5, 0.9)):
        choose(LOGITS, jax.random.key(0), sampling)
    assert choose._cache_size() == compiled


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Sampling(**settings)

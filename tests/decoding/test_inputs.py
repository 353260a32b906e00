"""What prefill and decode_step refuse, and what they let pass."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4
from dsv4.config import load_config
from dsv4.config.overrides import parse_layers
from dsv4.decoding.inputs import InputError
from dsv4.decoding.run import decode_step, prefill

IDS = np.array([[0, 5, 6], [0, 7, 0]])


@pytest.fixture(scope="module")
def model():
    return dsv4.init(replace(load_config("tiny").model, layers=parse_layers("window"), mtp_blocks=0))


@pytest.fixture(scope="module")
def cache(model):
    return prefill(model, IDS, lengths=[3, 2], capacity=8)[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [3.0, 2.0]}, r"lengths are \[3.0, 2.0\], float64: integers are needed"),
        ({"lengths": [3, float("nan")]}, "lengths are .*nan.*: integers are needed"),
        ({"lengths": [3, 4]}, r"lengths are \[3, 4\]: each must be between 1 and 3"),
        ({"lengths": [3, 0]}, "each must be between 1 and 3"),
        ({"lengths": [3]}, r"lengths have shape \(1,\), expected \(2,\)"),
        ({"capacity": 0}, "3 tokens do not fit: the capacity is 0"),
        ({"capacity": 2}, "3 tokens do not fit: the capacity is 2"),
        ({"capacity": 513}, "a capacity of 513 tokens exceeds the model's context of 512"),
    ],
)
def test_prefill_refuses(model, options, message):
    with pytest.raises(InputError, match=message):
        prefill(model, IDS, **options)


def test_prefill_into_a_cache_refuses(model, cache):
    with pytest.raises(InputError, match="capacity=8 with a cache, which holds 8 tokens: give one of them"):
        prefill(model, IDS, capacity=8, cache=cache)
    with pytest.raises(InputError, match="the ids have 1 rows and the cache holds 2 sequences"):
        prefill(model, IDS[:1], cache=cache)
    with pytest.raises(InputError, match="9 tokens do not fit: the capacity is 8"):
        prefill(model, np.zeros((2, 6), np.int32), cache=cache)


@pytest.mark.parametrize(
    ("tokens", "count", "message"),
    [
        ([1.0, 2.0], None, "tokens have dtype float64: integers are needed"),
        (jnp.ones(2), None, "tokens have dtype float32: integers are needed"),
        (np.zeros((2, 1, 1), np.int32), None, r"tokens have shape \(2, 1, 1\)"),
        (np.zeros((2, 0), np.int32), None, r"tokens have shape \(2, 0\)"),
        (np.zeros((2, 5), np.int32), None, r"decode_step got 5 tokens a row, at most 4: use prefill\(cache=...\)"),
        ([1, 2, 3], None, "the ids have 3 rows and the cache holds 2 sequences"),
        ([1, 320], None, r"token id 320 is out of range: the vocabulary has ids 0\.\.319"),
        ([1, 2], [1, 2], r"count is \[1, 2\]: each must be between 0 and 1"),
        ([1, 2], jnp.array([-1, 1]), r"count is \[-1, 1\]: each must be between 0 and 1"),
        ([1, 2], [1.0, 1.0], r"count is float64 \(2,\): integers \(2,\) are needed"),
        ([1, 2], 1, r"count is int64 \(\): integers \(2,\) are needed"),
    ],
)
def test_decode_step_refuses(model, cache, tokens, count, message):
    with pytest.raises(InputError, match=message):
        decode_step(model, tokens, cache, count=count)


def test_decode_step_takes_lists_and_arrays_also_inside_jit(model, cache):
    tokens, count = [3, 4], [1, 0]
    logits, after = decode_step(model, tokens, cache, count=count)
    assert logits.shape == (2, 320) and after.length.tolist() == [4, 2]
    step = jax.jit(lambda tokens, count: decode_step(model, tokens, cache, count=count))
    jitted, _ = step(jnp.array(tokens), jnp.array(count))
    np.testing.assert_allclose(jitted, logits, atol=1e-5)
    assert decode_step(model, np.array(tokens)[:, None], cache)[0].shape == (2, 1, 320)

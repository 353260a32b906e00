"""Routing against its definition: what the bias may touch, how weights are normalised, in which order rows go."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.router import router

TOKENS, WIDTH, EXPERTS, CHOSEN = 20, 6, 8, 3
SCORES = {
    "sqrtsoftplus": lambda z: np.sqrt(np.log1p(np.exp(z))),
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "softmax": lambda z: np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True),
}
route = functools.partial(jax.jit, static_argnames=("k", "scoring", "normalize", "scale"))(router)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def definition(x, weight, bias, scoring, normalize, scale):
    """(experts [N, k], weights [N, k], scores [N, E]) in float64; ties to the lower expert."""
    scores = SCORES[scoring](x.astype(np.float64) @ weight.T.astype(np.float64))
    biased = scores if bias is None else scores + bias
    experts = np.argsort(-biased, axis=-1, kind="stable")[:, :CHOSEN]
    weights = np.take_along_axis(scores, experts, axis=-1)
    if normalize and scoring != "softmax":
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return experts, weights * scale, scores


@pytest.mark.parametrize(("scoring", "normalize"), [*((name, True) for name in SCORES), ("sqrtsoftplus", False)])
def test_definition(scoring, normalize):
    """The bias moves the choice and nothing else; softmax weights are never renormalised."""
    x, weight = normal(0, TOKENS, WIDTH), normal(1, EXPERTS, WIDTH)
    bias = np.array([3, 0, 0, 0, 0, 0, 0, -3], np.float32)
    for given in (0 * bias, bias):
        got = route(x, weight, given, None, k=CHOSEN, scoring=scoring, normalize=normalize, scale=2.5)
        experts, weights, scores = definition(x, weight, given, scoring, normalize, 2.5)
        np.testing.assert_array_equal(got.experts, experts)
        np.testing.assert_allclose(got.weights, weights, rtol=1e-5)
        np.testing.assert_allclose(got.scores, scores, rtol=1e-5)
        total = np.asarray(got.weights).sum(axis=-1)
        if normalize and scoring != "softmax":
            np.testing.assert_allclose(total, 2.5, rtol=1e-5)
        else:
            assert np.abs(total - 2.5).max() > 0.5
    assert np.all(experts[:, 0] == 0) and not np.any(experts == 7), "the bias decides in this data"


def test_rows_are_grouped_by_expert_and_keep_their_order():
    got = route(
        normal(0, TOKENS, WIDTH), normal(1, EXPERTS, WIDTH), None, None,
        k=CHOSEN, scoring="sigmoid", normalize=True, scale=1.0,
    )  # fmt: skip
    flat = np.asarray(got.experts).reshape(-1)
    np.testing.assert_array_equal(got.counts, np.bincount(flat, minlength=EXPERTS))
    assert got.order.dtype == got.counts.dtype == np.int32
    np.testing.assert_array_equal(got.order, np.lexsort((np.arange(flat.size), flat)))


def test_ties_go_to_the_lower_expert():
    x, weight = np.ones((2, WIDTH), np.float32), np.zeros((EXPERTS, WIDTH), np.float32)
    bias = np.array([0, 1, 0, 1, 0, 1, 0, 1], np.float32)
    for given, experts in ((None, [0, 1, 2]), (bias, [1, 3, 5])):
        got = route(x, weight, given, None, k=3, scoring="sqrtsoftplus", normalize=True, scale=1.0)
        assert got.experts.tolist() == [experts] * 2
        np.testing.assert_allclose(got.weights, 1 / 3, rtol=1e-6)


def test_given_experts_are_taken_as_they_are():
    """Hash routing: the table says which experts, the router only how much; a useless expert may be among them."""
    x, weight = normal(0, TOKENS, WIDTH), normal(1, EXPERTS, WIDTH)
    table = np.stack([np.random.default_rng(n).permutation(EXPERTS)[:CHOSEN] for n in range(TOKENS)]).astype(np.int32)
    got = route(x, weight, None, table, k=CHOSEN, scoring="sqrtsoftplus", normalize=True, scale=1.5)
    scores = definition(x, weight, None, "sqrtsoftplus", True, 1.5)[2]
    weights = np.take_along_axis(scores, table, axis=-1)
    np.testing.assert_array_equal(got.experts, table)
    np.testing.assert_allclose(got.weights, 1.5 * weights / weights.sum(axis=-1, keepdims=True), rtol=1e-5)
    np.testing.assert_array_equal(got.counts, np.bincount(table.reshape(-1), minlength=EXPERTS))


def test_routing_is_float32_whatever_comes_in():
    """Two experts that bfloat16 arithmetic cannot tell apart."""
    x = jnp.ones((1, 2), jnp.bfloat16)
    weight = np.array([[1, 0], [1, 1e-4]], np.float32)
    got = route(x, weight, None, None, k=1, scoring="sigmoid", normalize=False, scale=1.0)
    assert got.experts.tolist() == [[1]] and got.weights.dtype == got.scores.dtype == np.float32


@pytest.mark.parametrize("scoring", SCORES)
def test_gradients_survive_hopeless_experts(scoring):
    """Logits of +-200, where softplus underflows: one NaN here would end a training run. None flows to the bias."""
    weight = np.array([[200, 0], [-200, 0], [0, 1], [0, -1]], np.float32)
    x = np.array([[1, 1], [-1, 0.5], [0.005, 0]], np.float32)

    def total(x, weight, bias):
        got = route(x, weight, bias, None, k=2, scoring=scoring, normalize=True, scale=1.0)
        return jnp.sum(got.weights * jnp.array([[1.0, 2.0]])) + jnp.sum(got.scores**2)

    value, gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(x, weight, np.zeros(4, np.float32))
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)
    assert np.any(gradients[0]) and np.any(gradients[1]) and not np.any(gradients[2])


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ValueError, match="k is 5: there are 4 experts"):
        route(normal(0, 2, 3), normal(1, 4, 3), None, None, k=5, scoring="softmax", normalize=True, scale=1.0)


def test_unknown_scoring_is_named():
    with pytest.raises(ValueError, match="scoring is 'relu': sqrtsoftplus, sigmoid or softmax"):
        route(normal(0, 2, 3), normal(1, 4, 3), None, None, k=1, scoring="relu", normalize=True, scale=1.0)

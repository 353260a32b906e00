"""mHC against its definition written out per token: sigmoids and eps, Sinkhorn, and which way `comb` is applied."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hyper_connection
from pallas_kernels.hyper_connection import Mix

STREAMS, WIDTH, NORM_EPS = 3, 5, 1e-5
MIXED = (2 + STREAMS) * STREAMS
pre = functools.partial(jax.jit, static_argnames=("iterations", "eps", "norm_eps"))(hyper_connection.pre)
post = jax.jit(hyper_connection.post)
head = functools.partial(jax.jit, static_argnames=("eps", "norm_eps"))(hyper_connection.head)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def mixing(streams, fn):
    """(f @ fn.T) * rsqrt(mean(f^2) + rms_eps) of one token's streams [n, D]."""
    flat = streams.astype(np.float64).reshape(-1)
    return fn.astype(np.float64) @ flat / np.sqrt(np.mean(flat**2) + NORM_EPS)


def sinkhorn(logits, iterations, eps):
    comb = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) + eps
    comb = comb / (comb.sum(axis=0, keepdims=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(axis=1, keepdims=True) + eps)
        comb = comb / (comb.sum(axis=0, keepdims=True) + eps)
    return comb


def definition(streams, fn, base, scale, norm_weight, iterations, eps):
    n = STREAMS
    mix = mixing(streams, fn)
    into = sigmoid(mix[:n] * scale[0] + base[:n]) + eps
    out = 2 * sigmoid(mix[n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = sinkhorn((mix[2 * n :] * scale[2] + base[2 * n :]).reshape(n, n), iterations, eps)
    x = sum(into[i] * streams[i].astype(np.float64) for i in range(n))
    return x / np.sqrt(np.mean(x**2) + NORM_EPS) * norm_weight, out, comb


PARAMETERS = {
    "fn": normal(1, MIXED, STREAMS * WIDTH),
    "base": normal(2, MIXED),
    "scale": np.array([0.5, 1.5, 2.5], np.float32),
    "norm_weight": normal(3, WIDTH),
}


@pytest.mark.parametrize(("iterations", "eps"), [(1, 1e-6), (3, 0.3), (20, 0.0)])
def test_pre(iterations, eps):
    """An eps of 0.3 shows every place it enters: behind pre, behind the softmax, and in each division."""
    streams = normal(0, 2, 4, STREAMS, WIDTH)
    x, mix = pre(streams, **PARAMETERS, iterations=iterations, eps=eps, norm_eps=NORM_EPS)
    for b, t in np.ndindex(2, 4):
        want = definition(streams[b, t], **PARAMETERS, iterations=iterations, eps=eps)
        for got, expected in zip((x, mix.post, mix.comb), want, strict=True):
            np.testing.assert_allclose(got[b, t], expected, rtol=3e-5, atol=1e-6)


def test_post_applies_comb_from_the_first_index_to_the_second():
    """New stream j = post_j * out + sum_i comb[i, j] * stream_i: un-transposed, the model still trains, but wrongly."""
    streams, out = normal(0, 2, STREAMS, WIDTH), normal(4, 2, WIDTH)
    shift = np.zeros((2, STREAMS, STREAMS), np.float32)
    shift[:, 0, 1] = shift[:, 1, 2] = shift[:, 2, 0] = 1  # old stream 0 becomes new stream 1, and so on
    nothing = np.zeros((2, STREAMS), np.float32)
    moved = post(streams, out, Mix(nothing, shift))
    np.testing.assert_array_equal(moved, streams[:, [2, 0, 1]])
    writes = post(np.zeros_like(streams), out, Mix(np.tile(np.float32([1, 0, 2]), (2, 1)), shift))
    np.testing.assert_array_equal(writes, np.stack([out, 0 * out, 2 * out], axis=1))
    comb, gate = normal(5, 2, STREAMS, STREAMS), normal(6, 2, STREAMS)
    want = gate[..., None] * out[:, None] + np.einsum("bij,bid->bjd", comb, streams)
    np.testing.assert_allclose(post(streams, out, Mix(gate, comb)), want, rtol=1e-5, atol=1e-6)


def test_comb_is_doubly_stochastic_after_twenty_iterations():
    """Rows and columns of 1 are what keeps the residual's size; extreme logits included. Columns come last."""
    base = np.concatenate([np.zeros(2 * STREAMS), 8 * normal(7, STREAMS * STREAMS)]).astype(np.float32)
    streams = normal(0, 64, STREAMS, WIDTH)
    _, mix = pre(streams, **PARAMETERS | {"base": base}, iterations=20, eps=1e-6, norm_eps=NORM_EPS)
    comb = np.asarray(mix.comb)
    assert comb.min() >= 0
    np.testing.assert_allclose(comb.sum(axis=-2), 1, atol=1e-4)
    np.testing.assert_allclose(comb.sum(axis=-1), 1, atol=0.05)
    assert np.all((np.asarray(mix.post) > 0) & (np.asarray(mix.post) < 2))
    _, once = pre(streams, **PARAMETERS | {"base": base}, iterations=1, eps=1e-6, norm_eps=NORM_EPS)
    assert np.abs(np.asarray(once.comb).sum(axis=-1) - 1).max() > 0.2, "this data needs the iterations"


def test_head_is_pre_alone():
    streams, fn, base, scale = (
        normal(0, 4, STREAMS, WIDTH),
        normal(1, STREAMS, STREAMS * WIDTH),
        normal(2, STREAMS),
        0.7,
    )
    got = head(streams, fn, base, np.float32([scale]), eps=0.3, norm_eps=NORM_EPS)
    for t in range(4):
        weights = sigmoid(mixing(streams[t], fn) * scale + base) + 0.3
        np.testing.assert_allclose(got[t], weights @ streams[t], rtol=2e-5, atol=1e-6)


def test_bfloat16_streams_are_mixed_in_float32():
    streams = jnp.asarray(normal(0, 4, STREAMS, WIDTH), jnp.bfloat16)
    how = {"iterations": 20, "eps": 1e-6, "norm_eps": NORM_EPS}
    x, mix = pre(streams, **PARAMETERS, **how)
    _, exact = pre(streams.astype(jnp.float32), **PARAMETERS, **how)
    assert x.dtype == jnp.bfloat16 and mix.comb.dtype == mix.post.dtype == jnp.float32
    np.testing.assert_array_equal(mix.comb, exact.comb)
    assert post(streams, x, mix).dtype == jnp.bfloat16


PRE = {"streams": normal(0, 2, STREAMS, WIDTH), **PARAMETERS, "iterations": 1, "eps": 1e-6, "norm_eps": NORM_EPS}
POST = {
    "streams": normal(0, 2, STREAMS, WIDTH),
    "out": normal(1, 2, WIDTH),
    "mix": Mix(normal(2, 2, STREAMS), normal(3, 2, STREAMS, STREAMS)),
}
HEAD = {"fn": normal(1, STREAMS, STREAMS * WIDTH), "base": normal(2, STREAMS), "scale": np.ones(1, np.float32)}


@pytest.mark.parametrize(
    ("op", "given", "changed", "error"),
    [
        (hyper_connection.pre, PRE, {"streams": [[1.0]]}, "streams is a list: a jax or NumPy array of floats"),
        (hyper_connection.pre, PRE, {"streams": np.ones((3, 5), np.int32)}, "streams is int32: an array of floats"),
        (hyper_connection.pre, PRE, {"streams": np.float32([1])}, r"streams have shape \(1,\): \[..., n, D\]"),
        (hyper_connection.pre, PRE, {"fn": HEAD["fn"]}, r"fn has shape \(3, 15\), not \(15, 15\): streams have"),
        (hyper_connection.pre, PRE, {"base": HEAD["base"]}, r"base has shape \(3,\), not \(15,\)"),
        (hyper_connection.pre, PRE, {"scale": HEAD["scale"]}, r"scale has shape \(1,\), not \(3,\): one for each"),
        (hyper_connection.pre, PRE, {"iterations": 0}, "iterations are 0: of Sinkhorn, 1 and more"),
        (hyper_connection.pre_quantize_rows, PRE, {"norm_weight": normal(1, 4)}, r"norm_weight has shape \(4,\)"),
        (hyper_connection.post, POST, {"out": normal(1, 3, WIDTH)}, r"out has shape \(3, 5\), not \(2, 5\)"),
        (hyper_connection.post, POST, {"mix": tuple(POST["mix"])}, "mix is a tuple: the Mix that `pre` gives"),
        (hyper_connection.post, POST, {"mix": POST["mix"]._replace(comb=POST["mix"].post)}, "mix.comb has shape"),
        (hyper_connection.head, {**PRE, **HEAD}, {"fn": PARAMETERS["fn"]}, r"fn has shape \(15, 15\), not \(3, 15\)"),
    ],
)
def test_operands_that_do_not_fit_are_refused(op, given, changed, error):
    """By the op itself: the checks of shapes by annotation are off where no test runs."""
    op, given = inspect.unwrap(op), given | changed
    with pytest.raises((TypeError, ValueError), match=error):
        op(**{name: given[name] for name in inspect.signature(op).parameters if name in given})


def test_one_stream_is_a_gated_residual():
    """n = 1: comb is 1, whatever its logit."""
    streams = normal(0, 4, 1, WIDTH)
    one = {"fn": normal(1, 3, WIDTH), "base": np.float32([0, 0, 50]), "scale": np.ones(3, np.float32)}
    _, mix = pre(streams, **one, norm_weight=np.ones(WIDTH, np.float32), iterations=20, eps=1e-6, norm_eps=NORM_EPS)
    np.testing.assert_allclose(mix.comb, 1, rtol=1e-5)


def test_gradients_are_finite_where_sigmoids_saturate():
    base = np.concatenate([[200, -200, 0], [-200, 200, 0], 100 * np.eye(STREAMS).reshape(-1)]).astype(np.float32)

    def total(streams, fn, base, scale):
        x, mix = pre(streams, fn, base, scale, PARAMETERS["norm_weight"], iterations=20, eps=1e-6, norm_eps=NORM_EPS)
        return jnp.sum(post(streams, x, mix) ** 2)

    gradient = jax.jit(jax.grad(total, (0, 1, 2, 3)))
    gradients = gradient(normal(0, 4, STREAMS, WIDTH), PARAMETERS["fn"], base, PARAMETERS["scale"])
    assert all(np.isfinite(g).all() and np.any(g) for g in gradients)

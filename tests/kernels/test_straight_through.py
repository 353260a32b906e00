"""Gradients of products that round what they multiply: those of the reference that does not round it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_matmul import matmul
from pallas_kernels.device import KINDS, pretend
from pallas_kernels.grouped_matmul import experts
from pallas_kernels.mosaic import interpreted
from pallas_kernels.quant import FORMATS, FP8_BLOCK, FP8_GROUP, TreatedWeight
from pallas_kernels.router import Routing
from pallas_kernels.straight_through import straight_through
from tests.kernels.compiled import quantize, round_trip
from tests.kernels.sums import ON_GPU

FP8_ROW, INT8_ROW = FORMATS["fp8_row"], FORMATS["int8_row"]
DENSE = [
    ("sm90", FP8_BLOCK, FP8_GROUP),
    ("scaled_dot", FP8_ROW, FP8_ROW),
    ("scaled_dot", INT8_ROW, INT8_ROW),
    ("block_dot", FP8_BLOCK, FP8_GROUP),
    ("reference", FP8_BLOCK, FP8_GROUP),
    ("reference", INT8_ROW, INT8_ROW),
]
EXPERTS = [case for case in DENSE if case[0] != "block_dot"]
E, D, I = 3, 128, 128  # noqa: E741


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def where_it_runs(implementation):
    """The interpreter, or a device that has the units (XLA multiplies such codes on a CPU too)."""
    return interpreted() if implementation == "sm90" else pretend(KINDS["H100 / H200"])


def check(run, inputs, activations, implementation):
    """`run(*inputs, activations, implementation)` rounds its input, and differentiates as if it did not."""
    with where_it_runs(implementation):
        y, pull = jax.vjp(lambda *inputs: run(*inputs, activations, implementation), *inputs)
        direction = normal(9, *y.shape, dtype=y.dtype)
        got = jax.block_until_ready(pull(direction))
    smooth, pull = jax.vjp(lambda *inputs: run(*inputs, None, "reference"), *inputs)
    rounding = 1e-4 if ON_GPU else 2e-6
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(pull(direction)), strict=True):
        largest = float(np.abs(np.asarray(theirs, np.float32)).max())
        assert ours.dtype == theirs.dtype and largest > 0.1
        # Kernels' gradients are compiled as one function, in which float32 sums of two terms may be rounded once; where
        # terms cancel, that rounding is what is left of them.
        bound = {"rtol": rounding, "atol": 2.0**-22 * largest} if ours.dtype == jnp.float32 else {"rtol": 0}
        np.testing.assert_allclose(ours, theirs, **bound)
    assert (np.asarray(y) != np.asarray(smooth)).mean() > 0.5, "nothing was rounded"


@pytest.mark.parametrize(("implementation", "form", "activations"), DENSE)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dense_products(implementation, form, activations, dtype):
    """Of rows with two leading axes, results in another type than the input's."""
    x, w = normal(0, 2, 3, D, dtype=dtype), quantize(normal(1, 128, D), form)

    def run(x, activations, implementation):
        return matmul(x, w, activations=activations, out_dtype=jnp.float32, implementation=implementation)

    check(run, (x,), activations, implementation)


@pytest.mark.parametrize(("implementation", "form", "activations"), DENSE)
def test_channels_in_16_bits_pass_the_gradient_on(implementation, form, activations):
    w, channels = normal(1, 128, D), jnp.asarray([3, 17], jnp.int32)
    kept = quantize(w.at[:, channels].set(0), form)
    treated = TreatedWeight(kept, None, channels, 2 * w[:, channels].astype(jnp.bfloat16))

    def run(x, activations, implementation):
        return matmul(x, treated, activations=activations, implementation=implementation)

    check(run, (normal(0, 5, D),), activations, implementation)


def routing_of(factors):
    """Tokens 0 .. 3 to two experts each, one of which gets no token."""
    chosen = np.array([[0, 2], [2, 0], [2, 0], [0, 2]], np.int32)
    flat = chosen.reshape(-1)
    counts, order = np.bincount(flat, minlength=E).astype(np.int32), np.argsort(flat, kind="stable").astype(np.int32)
    return Routing(jnp.asarray(chosen), factors, jnp.zeros((4, E)), jnp.asarray(counts), jnp.asarray(order))


def expert_weights(form):
    return [
        quantize(normal(seed, E, *shape) / np.sqrt(shape[1]), form)
        for seed, shape in enumerate([(I, D), (I, D), (D, I)])
    ]


@pytest.mark.parametrize(("implementation", "form", "activations"), EXPERTS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_experts(implementation, form, activations, dtype):
    """To tokens and routing weights: the router learns through them."""
    weights = expert_weights(form)

    def run(x, factors, activations, implementation):
        how = {"limit": 2.0, "activations": activations, "implementation": implementation}
        return experts(x, *weights, routing_of(factors), **how)

    factors = jnp.asarray(np.random.default_rng(4).uniform(0.2, 1.5, (4, 2)), jnp.float32)
    check(run, (normal(5, 4, D, dtype=dtype), factors), activations, implementation)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_layer_of_which_one_weight_is_not_quantised(batch_invariant):
    """It gets its own gradient, and the others' roundings are passed straight through."""
    w1, _, w2 = expert_weights(FP8_BLOCK)
    x, w3, routing = normal(5, 4, D), normal(1, E, I, D) / np.sqrt(D), routing_of(jnp.ones((4, 2)))

    def loss(x, w3, activations):
        how = {"limit": 0.0, "activations": activations, "batch_invariant": batch_invariant}
        return jnp.sum(experts(x, w1, w3, w2, routing, **how, implementation="reference"))

    gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    got, smooth = (gradient(x, w3, activations) for activations in (FP8_GROUP, None))
    for ours, theirs in zip(got, smooth, strict=True):
        # Where the gate is rounded, its derivative is that of a neighbour.
        assert np.linalg.norm(ours - theirs) < 0.1 * np.linalg.norm(theirs)


def test_forward_mode_of_a_dense_product():
    x, w = normal(0, 5, D), quantize(normal(1, 128, D), FP8_BLOCK)
    run = functools.partial(matmul, w=w, implementation="reference")
    got, want = (jax.jvp(functools.partial(run, activations=a), (x,), (2 * x,))[1] for a in (FP8_GROUP, None))
    np.testing.assert_array_equal(got, want)


def test_a_layer_compiled_with_its_gradient():
    """Everything that is no input may be traced too."""
    weights, x, factors = expert_weights(FP8_ROW), normal(5, 4, D), jnp.ones((4, 2))

    def loss(x, factors, weights, implementation, activations):
        how = {"limit": 2.0, "activations": activations, "implementation": implementation}
        return jnp.sum(experts(x, *weights, routing_of(factors), **how))

    gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=(3, 4))
    with pretend(KINDS["H100 / H200"]):
        got = gradient(x, factors, weights, "scaled_dot", FP8_ROW)
    for ours, theirs in zip(got, gradient(x, factors, weights, "reference", None), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_constants_get_no_gradient():
    """Whatever they are: codes, scales, integers, nothing."""

    def run(x, constants):
        return round_trip(x, constants["format"].format) * constants["factor"]

    def smooth(x, constants):
        return x * constants["factor"]

    call = straight_through(run, smooth)
    constants = {"format": quantize(normal(1, 2, D), FP8_ROW), "factor": jnp.float32(3), "none": None}
    x = normal(0, 2, D)
    y, pull = jax.vjp(call, x, constants)
    np.testing.assert_array_equal(y, run(x, constants))
    to_x, to_constants = pull(jnp.ones_like(y))
    np.testing.assert_array_equal(to_x, jnp.full_like(x, 3))
    assert to_constants["factor"] == 0 and not to_constants["format"].values.astype(jnp.float32).any()
    codes = constants | {"format": quantize(normal(1, 2, D), INT8_ROW)}
    _, to_codes = jax.vjp(call, x, codes)[1](jnp.ones_like(y))
    assert to_codes["format"].values.dtype == jax.dtypes.float0

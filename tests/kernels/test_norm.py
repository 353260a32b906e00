"""RMSNorm: multiplied in float32, cast once."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import norm

rms_norm = jax.jit(norm.rms_norm, static_argnums=2)


def test_definition_and_the_place_of_eps():
    x, weight = np.array([[3.0, -4.0], [0.0, 0.0], [1e-4, 0.0]], np.float32), np.array([2.0, -1.0], np.float32)
    want = x / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(rms_norm(x, None, 1e-3), want, rtol=1e-6)
    np.testing.assert_allclose(rms_norm(x, weight, 1e-3), want * weight, rtol=1e-6)


def test_one_cast_behind_the_weight():
    """bfloat16 in and out: casting before the weight as well would double the rounding error."""
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(64, 32)).astype(jnp.bfloat16), rng.normal(size=32).astype(jnp.bfloat16)
    got = rms_norm(x, weight, 1e-6)
    want = np.asarray(rms_norm(x.astype(np.float32), weight.astype(np.float32), 1e-6)).astype(jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got), want)

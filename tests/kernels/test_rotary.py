"""RoPE by complex numbers: interleaved pairs, the last channels, float32 angles."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import rotary

rotate = jax.jit(rotary.rotate)

FREQUENCIES = np.array([1.0, 0.3, 0.01], np.float32)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_neighbouring_channels_form_the_pairs():
    """Channels 2i and 2i + 1 are one complex number; rotating halves instead is the classic silent mistake."""
    x, positions = normal(0, 2, 5, 10), np.array([[0, 1, 2, 77, 3], [9, 9, 0, 1, 500]])
    got = np.asarray(rotate(x, positions, FREQUENCIES))
    np.testing.assert_array_equal(got[..., :4], x[..., :4])
    pairs = x[..., 4:].astype(np.float64).reshape(2, 5, 3, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * positions[..., None] * FREQUENCIES)
    want = np.stack([turned.real, turned.imag], axis=-1).reshape(2, 5, 6)
    np.testing.assert_allclose(got[..., 4:], want, atol=2e-5)
    unit = rotate(np.float32([[1, 0, 0, 0]]), np.array([1]), np.float32([np.pi / 2, 0]))
    np.testing.assert_allclose(unit, [[0, 1, 0, 0]], atol=1e-6)


def test_inverse_undoes_and_only_differences_of_positions_count():
    x, y = normal(1, 64, 6), normal(2, 64, 6)
    positions = np.random.default_rng(3).integers(0, 2000, 64)
    by, turn = jax.jit(rotary.rotation)(positions, FREQUENCIES), jax.jit(rotary.turn)
    np.testing.assert_allclose(turn(turn(x, by), by.inverse), x, atol=1e-5)
    np.testing.assert_array_equal(turn(np.stack([x, x], 1), by.shared(1))[:, 1], turn(x, by))

    def product(shift):
        there, here = positions + shift, np.full_like(positions, shift)
        return np.vecdot(rotate(x, there, FREQUENCIES), rotate(y, here, FREQUENCIES))

    np.testing.assert_allclose(product(0), product(31), atol=2e-3)


def test_low_precision_rotates_in_float32():
    low, positions = normal(4, 8, 6).astype(jnp.bfloat16), np.arange(8) * 999
    got = rotate(low, positions, FREQUENCIES)
    assert got.dtype == jnp.bfloat16
    want = np.asarray(rotate(low.astype(np.float32), positions, FREQUENCIES)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(got), want)

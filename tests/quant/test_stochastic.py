"""Stochastic rounding: one of the two neighbours, in the right proportion, the same for the same key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import quant
from pallas_kernels.formats import ELEMENTS, QuantFormat
from pallas_kernels.quant import elements

quantize = jax.jit(quant.quantize, static_argnames="form")
dequantize = jax.jit(quant.dequantize)
every_element = pytest.mark.parametrize("element", ELEMENTS)


def grid_of(element):
    """Every finite value of an element, ascending, from its codes."""
    kind = ELEMENTS[element]
    codes = np.arange(16 if kind.packing == 2 else 256, dtype=np.uint8)
    stored = codes[0::2] | codes[1::2] << 4 if kind.packing == 2 else codes
    values = elements.decode(jnp.asarray(stored.view(kind.dtype)), element)
    values = np.asarray(values).view(np.float32)
    return np.unique(values[np.isfinite(values) & (np.abs(values) <= kind.largest)])


def rounded(x, element, seed=0):
    """Under the scale 1."""
    form = QuantFormat(element, (None, None), rounding="stochastic")
    return np.asarray(dequantize(quantize(x, form, scale=jnp.ones((1, 1)), key=jax.random.key(seed))))


@every_element
@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-30, 20))
def test_lands_on_the_two_neighbours_only_and_grid_points_stay(element, seed, exponent):
    grid, rng = grid_of(element), np.random.default_rng(seed)
    anything = np.clip(rng.standard_normal(1024) * 2.0**exponent, grid[0], grid[-1]).astype(np.float32)
    beside = np.nextafter(grid, rng.choice(np.float32([-np.inf, np.inf]), grid.size)).clip(grid[0], grid[-1])
    x = np.resize(np.concatenate([grid, beside, anything]), (1, 2048))
    got = rounded(x, element, seed)
    below = grid[np.searchsorted(grid, x, side="right") - 1]
    above = grid[np.searchsorted(grid, x, side="left")]
    assert np.all((got == below) | (got == above))
    np.testing.assert_array_equal(got[0, : grid.size], grid)


@every_element
@pytest.mark.parametrize("fraction", [0.03, 0.5, 0.8])
def test_is_unbiased_between_any_two_neighbours(element, fraction):
    """Steps of every size, subnormal ones too, both signs. The share rounded up is binomial: five deviations."""
    grid, draws = grid_of(element).astype(np.float64), 4096
    at = np.unique(np.linspace(0, grid.size - 2, 32).astype(int))
    low, high = grid[at][:, None], grid[at + 1][:, None]
    x = (low + fraction * (high - low)).astype(np.float32)
    got = rounded(np.tile(x, draws), element)
    share = np.mean(got == high, axis=1)
    want = ((x - low) / (high - low))[:, 0]
    assert np.all(np.abs(share - want) < 5 * np.sqrt(fraction * (1 - fraction) / draws))
    assert np.all((got == high) | (got == low))


@every_element
def test_signs_zeros_and_what_is_too_large(element):
    largest = ELEMENTS[element].largest
    x = np.float32([[0.0, -0.0, largest * 9, -largest * 9, 2.0**-149, -(2.0**-149), largest, -largest]])
    for seed in range(8):
        got = rounded(x, element, seed)
        np.testing.assert_array_equal(got[0, [2, 3, 6, 7]], np.float32([1, -1, 1, -1]) * np.float32(largest))
        assert not np.any(got[0, [0, 1, 4, 5]])  # 2^-149 of a step is never enough
        if element != "int8":
            np.testing.assert_array_equal(np.signbit(got[0, :2]), [False, True])


@every_element
def test_a_key_decides_and_scales_do_not_depend_on_it(element):
    form = QuantFormat(element, (1, 32), "ue8m0", rounding="stochastic")
    x = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    first, again, other = (quantize(x, form, key=jax.random.key(seed)) for seed in (1, 1, 2))
    for name in ("values", "scale"):
        np.testing.assert_array_equal(np.asarray(getattr(first, name)), np.asarray(getattr(again, name)))
    assert np.any(np.asarray(first.values) != np.asarray(other.values))
    np.testing.assert_array_equal(np.asarray(first.scale), np.asarray(other.scale))
    nearest = quantize(x, QuantFormat(element, (1, 32), "ue8m0"))
    np.testing.assert_array_equal(np.asarray(nearest.scale), np.asarray(first.scale))
    assert np.all(np.isfinite(dequantize(first)))


def test_a_tile_that_is_not_finite_stays_nan():
    form = QuantFormat("e2m1", (1, 32), "ue8m0", rounding="stochastic")
    x = np.zeros((2, 64), np.float32)
    x[0, 3] = np.inf
    got = dequantize(quantize(x, form, key=jax.random.key(0)))
    assert np.all(np.isnan(got[0, :32])) and not np.any(got[0, 32:]) and not np.any(got[1])

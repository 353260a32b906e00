"""What holds for every format and any float32 input: error bounds, scales, signs, stability, tainted tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import quant
from pallas_kernels.formats import ELEMENTS, FORMATS, QuantFormat
from pallas_kernels.row_format import index_format

quantize = jax.jit(quant.quantize, static_argnames="form")
dequantize = jax.jit(quant.dequantize, static_argnames="dtype")
examples = settings(max_examples=15, deadline=None, derandomize=True)

SHAPE = (2, 3, 256)  # two experts; tiles of 128 x 128 are partial
BF16_SCALE = QuantFormat("e4m3", (1, None), "bfloat16")
FORMS = [
    *FORMATS.values(),
    BF16_SCALE,
    index_format("fp8").quant,  # float32 scales that are powers of two
    QuantFormat("int8", (1, 32), "ue8m0"),
    QuantFormat("e2m1", (1, 16), "float32"),
]
every_format = pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.name}{':2^n' * form.power_of_two}")
ROUNDING = 2.0**-22  # relative, of a product and a quotient in float32
TINY = 2.0**-125  # what devices flush where scales are no powers of two, and a rounding of it

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
special = st.sampled_from([0.0, -0.0, 3.4028235e38, -3.4028235e38, 2.0**-149, -(2.0**-126), 448.0, 6.0, 1e-4])


@st.composite
def arrays(draw, shape=SHAPE):
    """Normal numbers with another power of two in every 64 columns, and any numbers at any places."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low, high = sorted(draw(st.tuples(st.integers(-150, 126), st.integers(-150, 126))))
    exponents = rng.integers(low, high + 1, (*shape[:-1], shape[-1] // 64)).repeat(64, axis=-1)
    x = np.clip(rng.standard_normal(shape) * np.exp2(exponents), -3.4e38, 3.4e38).astype(np.float32)
    for value in draw(st.lists(finite | special, max_size=8)):
        x.reshape(-1)[rng.integers(x.size)] = value
    return x


def per_element(tiles, form, shape=SHAPE):
    """One number a tile, spread over its elements."""
    rows, columns = (size if side is None else side for side, size in zip(form.tile, shape[-2:], strict=True))
    return np.asarray(tiles).repeat(rows, axis=-2).repeat(columns, axis=-1)[..., : shape[-2], : shape[-1]]


def tile_amax(x, scale, form):
    """[tiles] largest magnitudes, found with tile numbers rather than by reshaping."""
    number = per_element(np.arange(scale.size).reshape(scale.shape), form, x.shape)
    amax = np.zeros(scale.size)
    np.maximum.at(amax, number.reshape(-1), np.abs(x).astype(np.float64).reshape(-1))
    return amax.reshape(scale.shape)


@every_format
@examples
@given(arrays())
def test_every_value_is_within_half_a_step_and_every_scale_is_the_least(form, x):
    """Exact where scales are powers of two, subnormal inputs and results included; but for float32's own rounding else.

    Also: finite input never becomes infinite, not even in bfloat16.
    """
    q = quantize(x, form)
    kind, scale, exact = ELEMENTS[form.element], np.asarray(q.scale).astype(np.float64), form.power_of_two
    relative, absolute = (0, 0) if exact else (ROUNDING, TINY)
    amax = np.clip(tile_amax(x, scale, form), form.amax_floor, form.amax_ceiling)
    slack = 2 if exact else 1 + 2.0**-7 if form.scale == "bfloat16" else 1
    assert np.all(amax / form.largest * (1 - ROUNDING) <= scale)
    assert np.all(scale <= amax / form.largest * slack * (1 + ROUNDING))

    got, wide, s = np.asarray(dequantize(q), np.float64), x.astype(np.float64), per_element(scale, form)
    assert np.all(np.isfinite(got)) and np.all(np.isfinite(np.asarray(dequantize(q, jnp.bfloat16), np.float32)))
    reach = np.clip(wide, -form.largest * s, form.largest * s)
    exponent = np.maximum(np.frexp(reach / s)[1] - 1, kind.lowest)
    step = s * (1 if kind.uniform else np.exp2(exponent - kind.mantissa))
    assert np.all(np.abs(got - reach) <= step / 2 + relative * np.abs(reach) + absolute)


@every_format
@examples
@given(arrays())
def test_negation_commutes(form, x):
    there, back = quantize(x, form), quantize(-x, form)
    np.testing.assert_array_equal(np.asarray(back.scale), np.asarray(there.scale))
    np.testing.assert_array_equal(dequantize(back), -np.asarray(dequantize(there)))


@every_format
@examples
@given(arrays())
def test_quantising_again_changes_nothing(form, x):
    """Powers of two: values stay to the bit, codes too once their largest is above half the element's largest (below,
    as 224 that 224.1 became, the same values have a smaller scale). Other scales: codes stay, scales to a rounding.
    """
    if not form.power_of_two:  # below, values are subnormal and flushed
        x = np.where(np.abs(x) < 2.0**-60, np.float32(0), x)
    first = quantize(x, form)
    once = dequantize(first)
    second = quantize(once, form)
    if form.power_of_two:
        np.testing.assert_array_equal(np.asarray(dequantize(second)).view(np.uint32), np.asarray(once).view(np.uint32))
        old, new = np.asarray(first.scale).astype(np.float64), np.asarray(second.scale).astype(np.float64)
        assert np.all((new == old) | (new == old / 2))
        same = per_element(new == old, form)
        if form.packing == 1:
            np.testing.assert_array_equal(np.asarray(first.values)[same], np.asarray(second.values)[same])
    else:
        np.testing.assert_array_equal(np.asarray(second.values), np.asarray(first.values))
        old, new = np.asarray(first.scale).astype(np.float64), np.asarray(second.scale).astype(np.float64)
        np.testing.assert_allclose(new, old, rtol=0 if form.scale == "bfloat16" else ROUNDING)


@every_format
@examples
@given(st.lists(finite | special, min_size=16, max_size=16))
def test_a_larger_amax_never_has_a_smaller_scale(form, amaxes):
    x = np.zeros((16, 1, 128), np.float32)
    x[:, 0, 5] = sorted(amaxes, key=abs)
    scale = np.asarray(quantize(x, form).scale).astype(np.float64)[:, 0, 0]
    assert np.all(np.diff(scale) >= 0) and np.all(scale > 0) and np.all(np.isfinite(scale))


@every_format
@examples
@given(st.integers(0, np.prod(SHAPE) - 1), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_what_is_not_finite_taints_exactly_its_tile(form, place, value):
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    clean = quantize(x, form)
    x.reshape(-1)[place] = value
    q = quantize(x, form)
    tiles = np.arange(clean.scale.size).reshape(clean.scale.shape)
    number = per_element(tiles, form)
    tainted = number == number.reshape(-1)[place]
    np.testing.assert_array_equal(np.isnan(np.asarray(q.scale).astype(np.float32)), tiles == number.reshape(-1)[place])
    want = np.where(tainted, np.nan, np.asarray(dequantize(clean)))
    np.testing.assert_array_equal(dequantize(q), want)
    np.testing.assert_array_equal(
        np.asarray(dequantize(q, jnp.bfloat16), np.float32), want.astype(jnp.bfloat16).astype(np.float32)
    )

"""A scale that was given: what it cannot reach saturates, what it can is rounded; arguments that make no sense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quant
from pallas_kernels.formats import ELEMENTS, FORMATS, QuantFormat
from pallas_kernels.row_format import index_format

quantize = jax.jit(quant.quantize, static_argnames="form")
dequantize = jax.jit(quant.dequantize)
FORMS = [*FORMATS.values(), QuantFormat("e4m3", (1, None), "bfloat16"), index_format("fp8").quant]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_saturates(form, scale):
    top = form.largest * scale
    x = np.zeros((3, 256), np.float32)
    x[1, :9] = [top, -top, top * 1.01, -top * 7, 3.4e38, -3.4e38, top * 2, scale, -scale]
    q = quantize(x, form, scale=jnp.full((1, 1), scale, form.scale_dtype))
    assert q.validate() == [] and np.all(np.asarray(q.scale).astype(np.float32) == scale)
    np.testing.assert_array_equal(dequantize(q)[1, :9], [top, -top, top, -top, top, -top, top, scale, -scale])
    assert not np.any(dequantize(q)[0])


def test_one_scale_a_tile_may_be_given():
    form = FORMATS["fp8_group"]
    x = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    own = quantize(x, form)
    given = quantize(x, form, scale=own.scale)
    np.testing.assert_array_equal(np.asarray(given.values), np.asarray(own.values))


@pytest.mark.parametrize("form", [FORMATS["fp8_row"], index_format("fp8").quant], ids=["float32", "power of two"])
def test_a_float32_scale_may_be_any_number(form):
    """Also where our own scales are powers of two: calibrated ones and those of other writers are not."""
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    q = quantize(x, form, scale=jnp.full((1, 1), 0.3, jnp.float32))
    np.testing.assert_array_equal(np.asarray(q.values), (x / np.float32(0.3)).astype(ELEMENTS["e4m3"].dtype))
    assert np.all(np.abs(dequantize(q) - x) <= np.abs(x) * 2.0**-4 + 0.3 * 2.0**-10 + 1e-7)


def test_refused_arguments_are_quoted():
    x, form = jnp.zeros((2, 128)), FORMATS["fp8_group"]
    with pytest.raises(ValueError, match="scale is float32, e4m3:1x128:ue8m0 stores float8_e8m0fnu"):
        quant.quantize(x, form, scale=jnp.ones((2, 1)))
    with pytest.raises(ValueError, match="rounding is 'nearest', key"):
        quant.quantize(x, form, key=jax.random.key(0))
    with pytest.raises(ValueError, match="rounding is 'stochastic', key None"):
        quant.quantize(x, QuantFormat("e4m3", (1, 128), rounding="stochastic"))
    with pytest.raises(ValueError, match="broadcasting"):
        quant.quantize(x, form, scale=jnp.ones((3, 1), form.scale_dtype))

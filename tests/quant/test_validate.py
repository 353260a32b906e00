"""Every way in which two arrays can fail to be a quantised tensor is found from shapes and dtypes alone."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.formats import FORMATS, QuantFormat
from pallas_kernels.quant import QuantTensor, dequantize

FORMS = {**FORMATS, "bfloat16 scales": QuantFormat("e4m3", (1, None), "bfloat16")}
DTYPES = ["uint8", "int8", "float8_e4m3fn", "float8_e5m2", "float32", "bfloat16", "int32", "float8_e8m0fnu", "bool"]
every_format = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
Abstract = jax.ShapeDtypeStruct


def valid(form, shape=(3, 130, 256)):
    """Shapes only: nothing is computed."""
    values = Abstract(form.values_shape(shape), form.values_dtype)
    return QuantTensor(values, Abstract(form.scale_shape(shape), form.scale_dtype), form)


def refused(x, *messages):
    problems = x.validate()
    assert len(problems) == len(messages), problems
    for problem, message in zip(problems, messages, strict=True):
        assert message in problem
    with pytest.raises(ValueError, match=f"not a {x.format.name} tensor: ") as error:
        x.require_valid()
    assert str(error.value).endswith("; ".join(problems))


@every_format
def test_what_quantising_makes_is_valid(form):
    for shape in [(1, 128), (130, 256), (3, 130, 256), (2, 3, 4, 384)]:
        assert valid(form, shape).validate() == []


@every_format
@pytest.mark.parametrize("part", ["values", "scale"])
def test_every_other_dtype_is_refused(form, part):
    x = valid(form)
    stored = getattr(x, part)
    for dtype in DTYPES:
        if dtype != stored.dtype:
            wrong = dataclasses.replace(x, **{part: Abstract(stored.shape, dtype)})
            refused(wrong, f"{part} are {dtype}, {form.name} stores {stored.dtype}")


@every_format
def test_every_other_shape_of_scales_is_refused(form):
    x = valid(form)
    shape = x.scale.shape
    others = [shape[1:], (*shape, 1), (), (1, *shape)]
    others += [(*shape[:i], shape[i] + by, *shape[i + 1 :]) for i in range(3) for by in (-1, 1)]
    others += [(shape[0], shape[2], shape[1])] if shape[1] != shape[2] else []
    for other in others:
        wrong = dataclasses.replace(x, scale=Abstract(other, form.scale_dtype))
        refused(wrong, f"scale has shape {other}, {form.name} of shape (3, 130, 256) needs {shape}")


@every_format
@pytest.mark.parametrize("shape", [(), (256,)])
def test_fewer_than_two_axes_are_refused(form, shape):
    x = QuantTensor(Abstract(shape, form.values_dtype), Abstract((1,), form.scale_dtype), form)
    refused(x, f"values have shape {shape}, at least two axes")


@pytest.mark.parametrize("name", ["fp4", "fp8_group", "fp8_entry", "e5m2_group"])
def test_a_tile_of_one_row_must_divide_the_columns(name):
    form = FORMATS[name]
    x = QuantTensor(Abstract((4, 72), form.values_dtype), Abstract((4, 1), form.scale_dtype), form)
    refused(x, f"tiles of 1 x {form.tile[1]} do not divide the last axis of (4, {72 * form.packing})")


def test_all_problems_are_listed_and_nothing_is_computed_with_them():
    form = FORMATS["fp4"]
    x = QuantTensor(jnp.zeros((4, 24), jnp.int8), jnp.zeros((4, 1)), form)
    refused(x, "values are int8", "scale are float32", "do not divide the last axis of (4, 48)")
    with pytest.raises(ValueError, match="values are int8.*scale are float32"):
        dequantize(x)

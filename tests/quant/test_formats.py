"""Formats as values: names, refusals that name the value, stored shapes and byte counts."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.formats import ELEMENTS, FORMATS, SCALES, FormatError, QuantFormat, format_name, parse_format
from pallas_kernels.quant import empty_rows, encode_rows, quantize
from pallas_kernels.quant.pages import pack_pages, page_bytes
from pallas_kernels.row_format import ENTRY_KINDS, INDEX_KINDS, RowFormat, entry_format, index_format

sides = st.none() | st.sampled_from([2, 32, 64, 128])
formats = st.builds(
    QuantFormat, st.sampled_from(list(ELEMENTS)), st.tuples(sides | st.just(1), sides), st.sampled_from(list(SCALES))
)
ROWS = {f"entry {kind}": entry_format(kind, 64) for kind in ENTRY_KINDS}
ROWS |= {f"index {kind}": index_format(kind) for kind in INDEX_KINDS}


@pytest.mark.parametrize("name", FORMATS)
def test_named_formats_are_found_by_both_names(name):
    form = FORMATS[name]
    assert parse_format(name) is form and parse_format(form.name) is form and format_name(form) == name
    assert {form: 1}[dataclasses.replace(form)] == 1  # hashed by value
    with pytest.raises(dataclasses.FrozenInstanceError):
        form.element = "e5m2"


def test_plain_is_no_format():
    assert parse_format("plain") is None and format_name(None) == "plain"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(formats)
def test_every_layout_survives_its_name(form):
    for text in (form.name, format_name(form)):
        assert parse_format(text).layout == form.layout


@pytest.mark.parametrize(
    "text, message",
    [
        ("fp9", "no format 'fp9'.*fp8_tensor.*e4m3:1x128:ue8m0"),
        ("e4m3:1x128", "no format 'e4m3:1x128'"),
        ("e4m3:128:ue8m0", r"no format 'e4m3:128:ue8m0': tile is \(128,\)"),
        ("e4m3:1xwide:ue8m0", "no format 'e4m3:1xwide:ue8m0'.*'wide'"),
        ("e4m3:0x32:ue8m0", r"tile is \(0, 32\)"),
        ("e2m1:1x3:ue8m0", r"tile is \(1, 3\): e2m1 puts 2"),
        ("e3m2:1x32:ue8m0", "element is 'e3m2': one of e4m3"),
        ("e4m3:1x32:e8m0", "scale is 'e8m0': one of float32"),
    ],
)
def test_what_is_no_format_is_quoted(text, message):
    with pytest.raises(FormatError, match=message):
        parse_format(text)


@pytest.mark.parametrize("floor", [0, -1, 1e-44, math.inf, math.nan, 3.4e38])
def test_floors_that_make_scales_zero_or_infinite_are_refused(floor):
    with pytest.raises(FormatError, match=re.escape(f"floor is {floor}: from 5.27e-36 to 2.98e+38")):
        QuantFormat("e4m3", (1, None), floor=floor)


def test_unknown_rounding_and_kinds_are_quoted():
    with pytest.raises(FormatError, match="rounding is 'down': one of nearest, stochastic"):
        QuantFormat("e4m3", (1, None), rounding="down")  # pyright: ignore[reportArgumentType]
    with pytest.raises(FormatError, match="entries cannot be 'fp4': float32, bfloat16, fp8, fp8_tensor, int8"):
        entry_format("fp4", 64)
    with pytest.raises(FormatError, match="index keys cannot be 'int8': float32, bfloat16, fp8, fp4"):
        index_format("int8")


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("fp8", (128,), r"e4m3:128x128:ue8m0 cannot hold this: shape \(128,\)"),
        ("fp4", (4, 33), r"last axis of \(4, 33\) is not a multiple of 2"),
        ("fp4", (4, 48), r"1 x 32 do not divide the last axis of \(4, 48\)"),
        ("fp8_group", (2, 4, 192), r"1 x 128 do not divide the last axis of \(2, 4, 192\)"),
    ],
)
def test_shapes_that_do_not_fit_are_quoted(name, shape, message):
    form = FORMATS[name]
    assert form.unsupported_reason(shape)
    for ask in (form.values_shape, form.scale_shape, form.nbytes):
        with pytest.raises(FormatError, match=message):
            ask(shape)
    if len(shape) > 1:  # quantize's annotation asks for two axes
        with pytest.raises(FormatError, match=message):
            quantize(jnp.zeros(shape), form)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(3, 256), (2, 130, 128), (1, 384)])
def test_shapes_and_bytes_are_those_of_the_arrays(name, shape):
    form = FORMATS[name]
    q = jax.eval_shape(lambda x: quantize(x, form), jax.ShapeDtypeStruct(shape, jnp.float32))
    assert q.validate() == [] and q.shape == shape and q.nbytes == form.nbytes(shape)
    assert q.values.shape == form.values_shape(shape) and q.scale.shape == form.scale_shape(shape)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("width", [80, 96, 128, 512, 576])
def test_bytes_of_rows_and_pages_are_those_of_the_arrays(name, width):
    form = ROWS[name]
    rows = jax.eval_shape(lambda: empty_rows(form, (3, 5, width)))
    assert rows.shape == (3, 5, width)
    assert sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(rows)) == 15 * form.nbytes(width)
    pages = jax.eval_shape(lambda: pack_pages(empty_rows(form, (3, 5, width)), 2))
    assert pages.shape == (3, 3, page_bytes(form, width, 2)) and pages.dtype == np.uint8


def test_bytes_of_the_released_rows():
    assert entry_format("fp8", 64).nbytes(512) == 584
    assert entry_format("bfloat16", 64).nbytes(512) == 1024
    assert index_format("fp8").nbytes(128) == 132 and index_format("fp4").nbytes(128) == 68
    assert page_bytes(entry_format("fp8", 64), 512, 64) == 37440


@pytest.mark.parametrize(
    "form, width, message",
    [
        (entry_format("fp8", 64), 64, "64 channels of which 64 stay bfloat16"),
        (entry_format("fp8", 64), 32, "32 channels of which 64 stay bfloat16"),
        (index_format("fp4"), 1, "1 channels, e2m1 puts 2"),
        (RowFormat(FORMATS["fp4"]), 33, "33 channels, e2m1 puts 2"),
    ],
)
def test_rows_that_do_not_fit_are_refused_not_cut(form, width, message):
    with pytest.raises(FormatError, match=message):
        encode_rows(jnp.zeros((3, width)), form)
    with pytest.raises(FormatError, match=message):
        empty_rows(form, (3, width))

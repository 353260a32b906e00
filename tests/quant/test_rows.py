"""Cached rows in every format: what goes in comes out within the format's error, simulated and stored alike."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import quant
from pallas_kernels.formats import MXFP4
from pallas_kernels.quant import empty_rows, take_rows
from pallas_kernels.quant.hadamard import hadamard
from pallas_kernels.row_format import ENTRY_KINDS, INDEX_KINDS, RowFormat, entry_format, index_format

encode_rows = jax.jit(quant.encode_rows, static_argnames="form")
decode_rows = jax.jit(quant.decode_rows, static_argnames="dtype")
as_cached = jax.jit(quant.as_cached, static_argnames="form")
TAIL = 16
FORMS = {f"entry {kind}": entry_format(kind, TAIL) for kind in ENTRY_KINDS}
FORMS |= {f"index {kind}": index_format(kind) for kind in INDEX_KINDS}
FORMS["fp4, a tail"] = RowFormat(MXFP4, tail=TAIL)
every_format = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
SHAPE = (2, 6, 128)  # without the tail 112 channels: the last tile is short, of 64 as of 32
WIDTH = SHAPE[-1]
examples = settings(max_examples=15, deadline=None, derandomize=True)


def bits(x):
    return np.asarray(x).view(np.uint8)


def normal(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@every_format
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_stored_and_simulated_are_the_same_bits(form, dtype):
    x = normal(0, *SHAPE, dtype=dtype)
    rows = encode_rows(x, form)
    assert rows.shape == SHAPE and rows.width == WIDTH and rows.nbytes == 12 * form.nbytes(WIDTH)
    stored, simulated = decode_rows(rows, x.dtype), as_cached(x, form)
    assert stored.dtype == simulated.dtype == x.dtype
    np.testing.assert_array_equal(bits(stored), bits(simulated))
    abstract = jax.eval_shape(lambda: empty_rows(form, SHAPE))
    assert jax.eval_shape(lambda: rows) == abstract


@every_format
def test_error_is_the_formats(form):
    """Relative, in the 2-norm of a row: at most half a step of the element, and on average half of that."""
    half_step = {None: 2.0**-8, "e4m3": 2.0**-4, "e2m1": 2.0**-2, "int8": 2.0**-6}[form.quant and form.quant.element]
    x = normal(1, *SHAPE)
    want = np.asarray(hadamard(jnp.asarray(x))) if form.hadamard else x
    got = np.asarray(as_cached(x, form))
    error = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert error.max() < half_step and error.mean() < half_step / 2
    if form.tail:
        np.testing.assert_array_equal(got[..., -TAIL:], x[..., -TAIL:].astype(ml_dtypes.bfloat16).astype(np.float32))


def test_the_short_last_tile_is_quantised_like_any():
    """The zeros behind it change neither scale nor codes."""
    form, x = entry_format("fp8", TAIL), normal(0, *SHAPE)
    x[..., 64:112] *= 100
    got = as_cached(x, form)
    for begin, end in ((0, 64), (64, 112)):
        moved = np.zeros(SHAPE, np.float32)
        moved[..., : end - begin] = x[..., begin:end]
        np.testing.assert_array_equal(as_cached(moved, form)[..., : end - begin], got[..., begin:end])


@every_format
@examples
@given(
    seed=st.integers(0, 2**32 - 1),
    exponents=st.tuples(st.integers(-149, 119), st.integers(-149, 119)).map(sorted),
    special=st.sampled_from([0.0, -0.0, 2.0**-149, -(2.0**-126), 3.3e38, -3.3e38]),
)
def test_finite_rows_stay_finite(form, seed, exponents, special):
    """Up to what bfloat16 holds, or for rotated rows what a sum of their channels holds."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(SHAPE) * np.exp2(rng.integers(*exponents, (2, 6, 1), endpoint=True))
    x[1, 4, rng.integers(WIDTH)] = special / (16 if form.hadamard else 1)
    rows = encode_rows(x.astype(np.float32), form)
    for dtype in (np.float32, ml_dtypes.bfloat16):
        assert np.all(np.isfinite(np.asarray(decode_rows(rows, dtype), np.float32)))


@every_format
def test_empty_rows_are_zeros_in_every_byte_and_decode_to_zero(form):
    rows = empty_rows(form, SHAPE)
    assert not any(bits(leaf).any() for leaf in jax.tree.leaves(rows))
    assert not bits(decode_rows(rows, np.float32)).any() and not bits(decode_rows(rows, jnp.bfloat16)).any()


@every_format
def test_taking_rows_commutes_with_decoding(form):
    x = normal(0, *SHAPE)
    rows, index = encode_rows(x, form), np.array([[5, 0, 0, 2], [1, 1, 3, 4]], np.int32)
    taken = jax.jit(take_rows)(rows, index)
    assert taken.shape == (2, 4, WIDTH) and taken.format == form
    want = np.take_along_axis(np.asarray(as_cached(x, form)), index[..., None], axis=1)
    filled = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf[:, :2]], axis=1), taken)  # to a shape known above
    np.testing.assert_array_equal(decode_rows(filled, np.float32)[:, :4], want)


@every_format
def test_rows_are_a_pytree_that_is_written_in_place(form):
    """What the cache does: every leaf has the rows on the same axis."""
    x, cache = normal(0, *SHAPE), empty_rows(form, SHAPE)
    write = jax.jit(lambda cache, new: jax.tree.map(lambda old, leaf: old.at[:, 3:5].set(leaf[:, :2]), cache, new))
    decoded = decode_rows(write(cache, encode_rows(x, form)), np.float32)
    np.testing.assert_array_equal(decoded[:, 3:5], as_cached(x, form)[:, :2])
    assert not np.any(decoded[:, :3]) and not np.any(decoded[:, 5:])


@every_format
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_gradients_pass_straight_through(form, dtype):
    """As if there were no rounding: the identity, or the rotation. Forward mode, reverse mode."""
    x, w = (normal(seed, *SHAPE, dtype=dtype) for seed in (0, 1))

    @jax.jit
    def derivatives(x, w):
        function = functools.partial(quant.as_cached, form=form)
        return jax.jvp(function, (x,), (w,)), jax.vjp(function, x)[1](w)[0]

    (out, forward), backward = derivatives(x, w)
    want = hadamard(jnp.asarray(w)) if form.hadamard else w  # the rotation is its own transpose
    np.testing.assert_array_equal(np.asarray(out), np.asarray(as_cached(x, form)))
    np.testing.assert_array_equal(np.asarray(forward), np.asarray(want))
    np.testing.assert_allclose(np.asarray(backward, np.float32), np.asarray(want, np.float32), rtol=2.0**-8, atol=1e-6)


@pytest.mark.parametrize("kind", ["entry fp8", "entry int8", "index fp8", "index fp4"])
def test_a_row_that_is_not_finite_taints_no_other(kind):
    form = FORMS[kind]
    x = normal(0, *SHAPE)
    want = np.array(as_cached(x, form))
    x[1, 2, 5] = np.nan
    want[1, 2, : 64 if kind == "entry fp8" else None] = np.nan
    np.testing.assert_array_equal(as_cached(x, form), want)

"""Quantising rows: the reference is `quant.quantize`, the Hopper kernel the reference, bit for bit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench import quantize_rows as bench
from pallas_kernels.bench.case import Bench
from pallas_kernels.device import KINDS, pretend
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.mosaic import interpreted
from pallas_kernels.mosaic.scales import scale_bytes
from pallas_kernels.norm import rms_norm
from pallas_kernels.quant import FORMATS, FP8_BLOCK, FP8_GROUP
from pallas_kernels.quantize_rows import kernel_sm90, quantize_rows, rms_norm_quantize_rows
from pallas_kernels.quantize_rows.cases import RowsCase
from pallas_kernels.quantize_rows.tiling import MOST_COLUMNS, RowTiling, default_tiling, unsupported_reason
from tests.kernels.compiled import quantize

FLOAT_SCALES = dataclasses.replace(FP8_GROUP, scale="float32", power_of_two=False)
FORMS = {
    "ue8m0": FP8_GROUP,
    "float32": FLOAT_SCALES,
    "float32 powers of two": dataclasses.replace(FLOAT_SCALES, power_of_two=True),
}
EPS = 1e-6
HOPPER = KINDS["H100 / H200"]


def hostile(rows, columns, dtype):
    """Rows of normal numbers whose groups' sizes differ by up to 2^40, and among them what casts get wrong.

    A group each: zeros of both signs, subnormals, numbers on the midpoints between codes and their neighbours, an
    outlier, the largest numbers there are, NaN, infinity.
    """
    rng = np.random.default_rng(rows * columns)
    x = rng.normal(size=(rows * columns // 128, 128)) * np.exp2(rng.integers(-20, 20, (rows * columns // 128, 1)))
    codes = np.arange(127, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float32)
    between = np.concatenate([(codes[1:] + codes[:-1]) / 2, [448.0, -448.0]])
    step = float(jnp.finfo(dtype).eps)
    odd = [
        np.where(np.arange(128) % 2, 0.0, -0.0),
        np.where(np.arange(128) % 2, 1e-40, -3e-39),
        between,
        -between * (1 + step),
        np.clip(between * (1 - step), 1e-3, None),
        np.where(np.arange(128) == 77, -1e30, x[0]),
        np.linspace(-1, 1, 128) * float(jnp.finfo(dtype).max),
        np.where(np.arange(128) == 5, np.nan, x[0]),
        np.where(np.arange(128) == 127, -np.inf, x[0]),
        np.full(128, 1e-5),  # below the floor
    ]
    count = min(len(x), len(odd))
    x[rng.permutation(len(x))[:count]] = np.stack(odd)[rng.permutation(len(odd))[:count]]
    return jnp.asarray(x.reshape(rows, columns), dtype)


def same(got, want):
    """Equal bits, but for those of a NaN, whose sign is nobody's."""
    got, want = np.asarray(got), np.asarray(want)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    wide = [np.asarray(side, np.float32) for side in (got, want)]
    np.testing.assert_array_equal(*(np.isnan(side) for side in wide))
    kind = {1: np.uint8, 4: np.uint32}[got.dtype.itemsize]
    numbers = ~np.isnan(wide[1])
    np.testing.assert_array_equal(got.view(kind)[numbers], want.view(kind)[numbers])


def same_tensor(got, want):
    assert not got.validate() and got.format == want.format
    same(got.values, want.values)
    same(got.scale, want.scale)


def run_kernel(function, *args, **kwargs):
    """The api's kernel, in the interpreter."""
    with pretend(HOPPER), interpreted():
        return jax.block_until_ready(function(*args, implementation="sm90", **kwargs))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_reference_is_quantize(form, dtype):
    x, weight = hostile(7, 256, dtype), jnp.linspace(0, 2, 256, dtype=dtype)
    how = {"implementation": "reference"}
    same_tensor(quantize_rows(x, FORMS[form], **how), quantize(x, FORMS[form]))
    normed = rms_norm(x, weight, EPS)
    same_tensor(rms_norm_quantize_rows(x, weight, EPS, FORMS[form], **how), quantize(normed, FORMS[form]))
    padded = quantize_rows(x, FORMS[form], padded_rows=16, tokens_last=True, **how)
    same_tensor(padded, quantize(jnp.pad(x, ((0, 9), (0, 0))), FORMS[form]))


@pytest.mark.parametrize(
    ("form", "tokens_last", "rows", "columns", "dtype"),
    [
        ("ue8m0", False, 1, 128, jnp.bfloat16),  # one group, held by all four warps
        ("ue8m0", False, 3, 256, jnp.float32),
        ("ue8m0", False, 8, 1024, jnp.bfloat16),
        ("ue8m0", False, 65, 512, jnp.bfloat16),
        ("ue8m0", True, 65, 512, jnp.float32),
        ("ue8m0", True, 130, 128, jnp.bfloat16),
        ("ue8m0", True, 130, 1024, jnp.bfloat16),
        ("float32", False, 65, 1024, jnp.bfloat16),
        ("float32", True, 3, 512, jnp.float32),
        ("float32", True, 1, 128, jnp.float32),
        ("float32 powers of two", False, 8, 1024, jnp.float32),
        ("float32 powers of two", True, 130, 256, jnp.bfloat16),
    ],
)
def test_kernel(form, tokens_last, rows, columns, dtype):
    x = hostile(rows, columns, dtype)
    same_tensor(run_kernel(quantize_rows, x, FORMS[form], tokens_last=tokens_last), quantize(x, FORMS[form]))


@pytest.mark.parametrize(("form", "tokens_last"), [("ue8m0", True), ("float32", False)])
def test_rows_of_zeros_behind_the_rows(form, tokens_last):
    x = hostile(5, 1024, jnp.bfloat16)
    got = run_kernel(quantize_rows, x, FORMS[form], tokens_last=tokens_last, padded_rows=8)
    same_tensor(got, quantize(jnp.pad(x, ((0, 3), (0, 0))), FORMS[form]))
    assert not np.asarray(got.values).view(np.uint8)[5:].any()
    with pytest.raises(ValueError, match="padded_rows is 4, x has 5 rows"):
        quantize_rows(x, padded_rows=4)


def test_the_order_of_scales_in_memory():
    x = hostile(5, 1024, jnp.bfloat16)
    want = scale_bytes(quantize(x, FP8_GROUP).scale)
    with interpreted():
        _, scale = kernel_sm90.quantize_rows(x, form=FP8_GROUP)
        _, tokens_last = kernel_sm90.quantize_rows(x, form=FP8_GROUP, tokens_last=True)
        np.testing.assert_array_equal(scale, want)
        np.testing.assert_array_equal(tokens_last, want.T)


@pytest.mark.parametrize("groups", [1, 2, 8, 16])
def test_no_bit_depends_on_the_tiling(groups):
    x = hostile(4, 2048, jnp.bfloat16)
    want = quantize(x, FP8_GROUP)
    with interpreted():
        codes, scale = kernel_sm90.quantize_rows(x, form=FP8_GROUP, tiling=RowTiling(groups, per_sm=1))
        same(codes, want.values)
        np.testing.assert_array_equal(scale, scale_bytes(want.scale))


@pytest.mark.parametrize(
    ("tokens_last", "rows", "columns", "dtype", "weight_dtype"),
    [
        (True, 1, 128, jnp.bfloat16, jnp.float32),  # one group a row: no sum over warps
        (False, 3, 256, jnp.bfloat16, None),
        (True, 8, 384, jnp.float32, jnp.bfloat16),  # three groups, which every warp holds
        (False, 65, 512, jnp.bfloat16, jnp.bfloat16),
        (True, 3, 4096, jnp.bfloat16, jnp.float32),
    ],
)
def test_behind_rms_norm(tokens_last, rows, columns, dtype, weight_dtype):
    """The tolerance: one code in a thousand may be its neighbour, and no scale is another in so few of them."""
    rng = np.random.default_rng(columns)
    x = jnp.asarray(rng.normal(size=(rows, columns)) * np.exp2(rng.integers(-8, 8, (rows, 1))), dtype)
    weight = None if weight_dtype is None else jnp.asarray(rng.normal(size=columns), weight_dtype)
    padded = -(-rows // 8) * 8
    got = run_kernel(rms_norm_quantize_rows, x, weight, EPS, tokens_last=tokens_last, padded_rows=padded)
    want = quantize(jnp.pad(rms_norm(x, weight, EPS), ((0, padded - rows), (0, 0))), FP8_GROUP)
    same(got.scale, want.scale)
    apart = np.asarray(got.values).view(np.uint8).astype(int) - np.asarray(want.values).view(np.uint8)
    assert np.abs(apart).max() <= 1 and np.mean(apart != 0) <= 1e-3
    assert not got.validate() and not np.asarray(got.values).view(np.uint8)[rows:].any()


def test_what_is_not_finite_stays_in_its_row():
    """A mean with NaN in it makes NaN of a whole row; an infinite one zeros and, of the infinity, NaN."""
    x = jnp.ones((4, 512), jnp.bfloat16).at[1, 7].set(jnp.nan).at[2, 200].set(jnp.inf)
    same_tensor(run_kernel(rms_norm_quantize_rows, x, None, EPS), quantize(rms_norm(x, None, EPS), FP8_GROUP))


@pytest.mark.parametrize("normed", [False, True])
def test_a_row_does_not_depend_on_the_others(normed):
    """Permuted rows give permuted bits, and fewer rows, which are cut up differently, the same."""
    x = hostile(40, 1024, jnp.bfloat16)
    order = np.random.default_rng(0).permutation(40)
    run = functools.partial(run_kernel, rms_norm_quantize_rows, weight=None, eps=EPS) if normed else None
    run = run or functools.partial(run_kernel, quantize_rows)
    whole, permuted, few = (run(x=rows) for rows in (x, x[order], x[:3]))
    for part in ("values", "scale"):
        rows = np.asarray(getattr(whole, part)).view(np.uint8)
        np.testing.assert_array_equal(np.asarray(getattr(permuted, part)).view(np.uint8), rows[order])
        np.testing.assert_array_equal(np.asarray(getattr(few, part)).view(np.uint8), rows[:3])


@pytest.mark.parametrize(
    ("shape", "dtype", "eps", "form", "reason"),
    [
        ((2, 192), jnp.bfloat16, None, FP8_GROUP, "x of shape (2, 192) has no rows of a multiple of 128 columns"),
        ((0, 128), jnp.bfloat16, None, FP8_GROUP, "x of shape (0, 128) has no rows"),
        ((2, 128), jnp.float16, None, FP8_GROUP, "x is float16, neither"),
        ((2, 128), jnp.bfloat16, None, FP8_BLOCK, "e4m3:128x128:ue8m0 is not e4m3:1x128"),
        ((2, 128), jnp.bfloat16, None, dataclasses.replace(FLOAT_SCALES, scale="bfloat16"), "e4m3:1x128:bfloat16 is"),
        ((2, 128), jnp.bfloat16, None, dataclasses.replace(FP8_GROUP, rounding="stochastic"), "stochastic rounding"),
        ((2, 128), jnp.bfloat16, None, dataclasses.replace(FP8_GROUP, floor=None), "near the subnormals"),
        ((2, 2 * MOST_COLUMNS), jnp.bfloat16, EPS, FP8_GROUP, "a mean over 16384 columns: a warpgroup holds 8192"),
    ],
)
def test_refusals(shape, dtype, eps, form, reason):
    x = jax.ShapeDtypeStruct(shape, dtype)
    with pretend(HOPPER):
        assert reason in (unsupported_reason(x, None, eps, form=form) or "")
    with pretend(KINDS["A100"]):
        assert unsupported_reason(x, None, eps, form=form) == "A100 is no Hopper GPU"


def test_a_named_kernel_is_refused_elsewhere():
    with (
        pretend(KINDS["CPU"]),
        pytest.raises(UnsupportedError, match="quantize_rows cannot run: sm90: CPU is no Hopper GPU"),
    ):
        quantize_rows(jnp.zeros((1, 128)), implementation="sm90")


@pytest.mark.parametrize("rows", [1, 16, 128, 4096])
@pytest.mark.parametrize("tokens_last", [False, True])
def test_chunks_divide_the_problem_and_feed_every_sm(rows, tokens_last):
    for blocks in (1, 4, 32, 56):
        for padded in (rows, -(-rows // 64) * 64):
            tiling = default_tiling(rows, padded, blocks, tokens_last=tokens_last, whole_rows=False, sms=132)
            assert (blocks if tokens_last else rows * blocks) % tiling.groups == 0
            assert padded * blocks % tiling.groups == 0
            assert tiling.groups <= 8 or padded * blocks // tiling.groups >= 264


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("normed", "rows", "padded"), [(False, 4096, 4096), (True, 4096, 4096), (True, 3, 8)])
def test_lowers_for_a_gpu(form, normed, rows, padded):
    """What the interpreter does not know: layouts and transfers."""
    x = jax.ShapeDtypeStruct((rows, 7168), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((7168,), jnp.float32) if normed else None
    run = functools.partial(
        kernel_sm90.quantize_rows,
        eps=EPS if normed else None,
        form=FORMS[form],
        tokens_last=padded != rows,
        padded_rows=padded,
    )
    jax.jit(run).trace(x, weight).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("columns", [128, 256, 384, 1536])
@pytest.mark.parametrize("normed", [False, True])
def test_rows_of_few_groups_lower_for_a_gpu(columns, normed):
    run = functools.partial(kernel_sm90.quantize_rows, eps=EPS if normed else None, form=FP8_GROUP, tokens_last=True)
    jax.jit(run).trace(jax.ShapeDtypeStruct((3, columns), jnp.float32)).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("normed", [False, True])
def test_a_benchmark_computes_what_it_says(normed):
    case: Bench = bench.bench(RowsCase("small", 2, 1024, normed))
    sets = jax.jit(case.inputs)(jax.random.key(0))
    want = case.reference(sets)
    assert want[0].shape == (2, 1024) and want[1].shape == (8, 2)
    with interpreted():
        got = jax.block_until_ready(
            kernel_sm90.quantize_rows(*sets, EPS if normed else None, form=FP8_GROUP, tokens_last=True)
        )
    assert case.judge(got, want) is None
    assert "of the codes differ" in (case.judge((want[0][::-1], want[1]), want) or "")
    assert case.ours and case.limit > 0 and len(list(bench.benches())) == 8


@pytest.mark.parametrize("form", [FP8_GROUP, FP8_BLOCK, FORMATS["fp8_row"], FORMATS["fp8_tensor"]], ids=str)
def test_no_rows(form):
    """The whole has one scale even so."""
    got = quantize_rows(jnp.zeros((0, 256)), form, implementation="reference")
    assert got.values.shape == (0, 256) and got.scale.shape == form.scale_shape((0, 256)) and not got.validate()
    assert np.isfinite(got.scale.astype(jnp.float32)).all()

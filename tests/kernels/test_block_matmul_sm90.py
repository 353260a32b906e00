"""The Hopper matmul kernels in the interpreter, race detection on, and lowered for a GPU that need not be there."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_matmul import decode_sm90, kernel_sm90, matmul
from pallas_kernels.block_matmul.tiling import FewRows, ManyRows
from pallas_kernels.device import KINDS, pretend
from pallas_kernels.mosaic import interpreted
from pallas_kernels.mosaic.scales import scale_bytes
from pallas_kernels.quant import FORMATS, FP8_BLOCK, FP8_GROUP, QuantTensor, TreatedWeight
from tests.kernels.compiled import dequantize, quantize
from tests.kernels.sums import ALONG_K, check

MANY = [
    (ManyRows(128, 256, 3, "columns"), (256, 512, 640)),
    (ManyRows(128, 256, 2, "columns"), (256, 512, 1024)),
    (ManyRows(256, 128, 2, "rows", in_turn=True), (256, 256, 1024)),
    (ManyRows(128, 128, 3, "rows"), (256, 384, 256)),
    (ManyRows(64, 256, 2, "columns", rows_first=False, width=1), (192, 512, 128)),
    (ManyRows(64, 128, 2, "columns", shares=2), (128, 256, 512)),
    (ManyRows(64, 128, 2, "columns", shares=2), (64, 128, 512)),
    (ManyRows(64, 128, 2, "columns", shares=4), (64, 128, 512)),
    (ManyRows(128, 128, 3, "rows", blocks=2, in_flight=2, shares=4), (128, 256, 1024)),
    (ManyRows(64, 64, 4, "columns", blocks=2, in_flight=2, cluster=2), (128, 128, 512)),
    (ManyRows(128, 32, 4, "rows", blocks=2, in_flight=2, cluster=2, cluster_along="columns"), (128, 192, 256)),
]
FEW = [
    (FewRows(blocks=2, stages=3, warpgroups=1), (8, 192, 768)),
    (FewRows(blocks=1, stages=2, warpgroups=1, shares=4), (8, 192, 1024)),
    (FewRows(blocks=2, stages=2, warpgroups=2, shares=2), (16, 256, 512)),
    (FewRows(blocks=4, stages=2, warpgroups=2), (64, 384, 1024)),
    (FewRows(blocks=1, stages=4, warpgroups=2), (24, 128, 128)),
    (FewRows(blocks=1, stages=1, warpgroups=2), (8, 128, 512)),
]


def operands(m, n, k, seed=0, formats=(FP8_GROUP, FP8_BLOCK)):
    """Quantised x [m, k] and w [n, k], with scales from 2^-20 to 2^12 between blocks."""
    rng = np.random.default_rng(seed)
    spread = np.exp2(rng.integers(-14, 6, (m, k // 128))).repeat(128, 1)
    x = quantize(jnp.asarray(rng.normal(size=(m, k)) * spread, jnp.float32), formats[0])
    spread = np.exp2(rng.integers(-6, 6, (-(-n // 128), k // 128))).repeat(128, 0).repeat(128, 1)[:n]
    w = quantize(jnp.asarray(rng.normal(size=(n, k)) * spread, jnp.float32), formats[1])
    return x, w


def expected(x, w):
    return np.asarray(dequantize(x), np.float64) @ np.asarray(dequantize(w), np.float64).T


@pytest.mark.parametrize(("tiling", "shape"), MANY)
def test_many_rows(tiling, shape):
    x, w = operands(*shape)
    with interpreted():
        y = kernel_sm90.matmul(x.values, scale_bytes(x.scale), w.values, scale_bytes(w.scale), tiling)
        y.block_until_ready()
    check(y, expected(x, w))


@pytest.mark.parametrize(("tiling", "shape"), FEW)
def test_few_rows(tiling, shape):
    x, w = operands(*shape)
    with interpreted():
        y = decode_sm90.matmul(x.values, scale_bytes(x.scale).T, w.values, scale_bytes(w.scale), tiling)
        y.block_until_ready()
    check(y, expected(x, w))


def test_float32_results_and_scales():
    x, w = operands(128, 256, 256)
    scales = [jnp.exp2(scale_bytes(t.scale).astype(jnp.float32) - 127) for t in (x, w)]
    with interpreted():
        many = kernel_sm90.matmul(x.values, scales[0], w.values, scales[1], ManyRows(128, 256, 2), jnp.float32)
        few = decode_sm90.matmul(x.values[:8], scales[0][:8].T, w.values, scales[1], FewRows(2, 2), jnp.float32)
        jax.block_until_ready((many, few))
    check(many, expected(x, w), jnp.float32)
    check(few, expected(x, w)[:8], jnp.float32)


def test_a_row_does_not_depend_on_the_others():
    """NaN in one row stays there, and the bits of the rest are those of another batch."""
    x, w = operands(16, 128, 512)
    poisoned = x.values.at[3].set(jnp.nan)
    other = x.values.at[8:].set(x.values[:8])
    run = functools.partial(decode_sm90.matmul, tiling=FewRows(blocks=2, stages=2))
    with interpreted():
        scale, weight = scale_bytes(x.scale).T, scale_bytes(w.scale)
        a, b, c = (np.asarray(run(v, scale, w.values, weight), np.float32) for v in (x.values, poisoned, other))
    assert np.isnan(b[3]).all()
    np.testing.assert_array_equal(np.delete(a, 3, 0), np.delete(b, 3, 0))
    np.testing.assert_array_equal(a[:8], c[:8])


def rows_of(x, w, kernel, tiling, out_dtype=jnp.bfloat16):
    """The kernel's product with scales of whole rows."""
    scales = (jnp.broadcast_to(side.scale[:, 0].astype(jnp.float32), (side.shape[0],)) for side in (x, w))
    with interpreted():
        y = kernel.matmul(x.values, next(scales), w.values, next(scales), tiling, out_dtype)
        return y.block_until_ready()


ROW, TENSOR = FORMATS["fp8_row"], FORMATS["fp8_tensor"]
E5M2_ROW = dataclasses.replace(ROW, element="e5m2")
COLUMNS = kernel_sm90, ManyRows(128, 256, 2, "columns"), (128, 256, 256)
ROWS = kernel_sm90, ManyRows(128, 128, 3, "rows", blocks=2, in_flight=2, in_turn=True), (256, 128, 256)
FEW_ROWS = decode_sm90, FewRows(blocks=2, stages=2, warpgroups=2), (16, 256, 512)
ONCE = [  # kernel, tiling, shape, format of x and of w, results
    (*COLUMNS, ROW, ROW, jnp.bfloat16),
    (*ROWS, ROW, TENSOR, jnp.float32),
    (*COLUMNS, E5M2_ROW, E5M2_ROW, jnp.float32),
    (*FEW_ROWS, TENSOR, ROW, jnp.bfloat16),
    (*FEW_ROWS, E5M2_ROW, ROW, jnp.float32),
]


@pytest.mark.parametrize(("kernel", "tiling", "shape", "x_format", "w_format", "out_dtype"), ONCE)
def test_scales_that_do_not_vary_along_k(kernel, tiling, shape, x_format, w_format, out_dtype):
    """One a row or in all; rows differ in size by powers, so that a scale of the wrong row shows."""
    m, n, k = shape
    rng = np.random.default_rng(1)
    sides = ((m, x_format), (n, w_format))
    x, w = (
        quantize(jnp.asarray(rng.normal(size=(size, k)) * np.exp(rng.normal(size=(size, 1))), jnp.float32), form)
        for size, form in sides
    )
    y = rows_of(x, w, kernel, tiling, out_dtype)
    check(y, expected(x, w), out_dtype, bound=ALONG_K if out_dtype == jnp.float32 else None)


def test_nan_stays_in_its_row():
    """A poisoned code or scale of a token; of rows whose scales multiply finished sums."""
    rng = np.random.default_rng(2)
    x, w = (quantize(jnp.asarray(rng.normal(size=(size, 256)), jnp.float32), ROW) for size in (128, 128))
    poisoned = dataclasses.replace(x, values=x.values.at[3].set(jnp.nan), scale=x.scale.at[5].set(jnp.nan))
    for kernel, tiling, rows in ((kernel_sm90, ManyRows(128, 128, 2, "rows"), 128), (decode_sm90, FewRows(2, 2), 8)):
        a, b = (
            np.asarray(
                rows_of(
                    dataclasses.replace(side, values=side.values[:rows], scale=side.scale[:rows]), w, kernel, tiling
                ),
                np.float32,
            )
            for side in (x, poisoned)
        )
        assert np.isnan(b[[3, 5]]).all()
        np.testing.assert_array_equal(np.delete(a, (3, 5), 0), np.delete(b, (3, 5), 0))


@pytest.mark.parametrize("scale", ["ue8m0", "float32"])
@pytest.mark.parametrize(
    ("tiling", "shape"),
    [
        (ManyRows(128, 128, 2, "rows"), (128, 256, 512)),
        (ManyRows(64, 128, 2, "columns", blocks=2, in_flight=2, shares=2), (64, 256, 512)),
        (FewRows(blocks=2, stages=2, warpgroups=2), (8, 256, 512)),
    ],
    ids=["scales in words", "scales in blocks", "few rows"],
)
def test_nan_of_a_weight_scale(tiling, shape, scale):
    """It reaches the results of its block, also by tiny scales of activations, and changes no bit of the others."""
    many = isinstance(tiling, ManyRows)
    x, w = operands(*shape, formats=[dataclasses.replace(form, scale=scale) for form in (FP8_GROUP, FP8_BLOCK)])
    poison = jnp.uint8(255) if scale == "ue8m0" else jnp.nan
    x_scale, w_scale = scale_bytes(x.scale), scale_bytes(w.scale)
    run = functools.partial((kernel_sm90 if many else decode_sm90).matmul, x.values, x_scale if many else x_scale.T)
    with interpreted():
        scales = w_scale, w_scale.at[1, 2].set(poison)
        want, got = (np.asarray(run(w.values, of_w, tiling), np.float32) for of_w in scales)
    assert np.isfinite(want).all() and np.isnan(got[:, 128:]).all()
    np.testing.assert_array_equal(got[:, :128], want[:, :128])


@pytest.mark.parametrize(
    "formats",
    [(FP8_GROUP, FORMATS["e5m2"]), (FORMATS["e5m2_group"], FP8_BLOCK)],
    ids=["weights", "activations"],
)
def test_e5m2_in_blocks(formats):
    x, w = operands(128, 256, 256, formats=formats)
    sides = [(side.values, scale_bytes(side.scale)) for side in (x, w)]
    (codes, scale), weight = sides
    with interpreted():
        many = kernel_sm90.matmul(codes, scale, *weight, ManyRows(128, 256, 2))
        few = decode_sm90.matmul(codes[:8], scale[:8].T, *weight, FewRows(2, 2))
        jax.block_until_ready((many, few))
    check(many, expected(x, w))
    check(few, expected(x, w)[:8])


OP = {
    # activations, weights, static scale
    "fp8_per_channel": (ROW, ROW, None),
    "fp8_per_tensor, static": (ROW, TENSOR, 0.01),
    "fp8_e5m2": (FORMATS["e5m2_group"], FORMATS["e5m2"], None),
}


@pytest.mark.parametrize(
    ("recipe", "dtype"), list(zip(OP, (jnp.float32, jnp.bfloat16, jnp.bfloat16), strict=True)), ids=list(OP)
)
def test_the_op_takes_formats_of_recipes(recipe, dtype):
    """Against the reference in float32, to which results of the kernel are compared: padded rows, a poisoned one."""
    activations, form, static = OP[recipe]
    rng = np.random.default_rng(3)
    w = quantize(jnp.asarray(rng.normal(size=(192, 256)), jnp.float32), form)
    if static is not None:
        w = TreatedWeight(w, jnp.full((1, 1), static, jnp.float32))
    x = jnp.asarray(rng.normal(size=(5, 256)), dtype).at[2, 7].set(jnp.nan)
    with interpreted():
        got = matmul(x, w, activations=activations, implementation="sm90").block_until_ready()
    want = matmul(x.astype(jnp.float32), w, activations=activations, implementation="reference")
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    assert np.isnan(want[2]).all() and not np.isnan(np.delete(want, 2, 0)).any()
    check(np.delete(got, 2, 0), np.delete(want, 2, 0), dtype)


def test_the_gradient_is_straight_through():
    x = jnp.asarray(np.random.default_rng(4).normal(size=(3, 128)), jnp.float32)
    w = quantize(jnp.asarray(np.random.default_rng(5).normal(size=(64, 128)), jnp.float32), ROW)

    def loss(x, implementation):
        return matmul(x, w, activations=ROW, implementation=implementation).sum()

    with interpreted():
        got = jax.grad(loss)(x, "sm90").block_until_ready()
    np.testing.assert_allclose(got, jnp.broadcast_to(dequantize(w).sum(0), x.shape), rtol=1e-5, atol=1e-5)


F8, E5 = jnp.float8_e4m3fn, jnp.float8_e5m2
TILINGS = [ManyRows(), ManyRows(128, 128, 6, "rows"), FewRows(), FewRows(4, 3, 2)]


# With 128 rows a thread block has one tile, which goes out straight from registers.
LOWERED = [(tiling, m, (F8, F8), False, jnp.bfloat16) for tiling in TILINGS[:2] for m in (128, 4096)]
LOWERED += [(tiling, 8, (F8, F8), False, jnp.bfloat16) for tiling in TILINGS[2:]]
LOWERED += [
    (tiling, m, *how, jnp.bfloat16)
    for tiling, m in ((TILINGS[0], 4096), (TILINGS[2], 8))
    for how in (((F8, E5), False), ((E5, E5), True))
]
LOWERED += [(ManyRows(stages=3), 4096, (F8, F8), False, jnp.float32)]
LOWERED += [(tiling, 8, (F8, F8), False, jnp.float32) for tiling in TILINGS[2:]]


@pytest.mark.parametrize(("tiling", "m", "dtypes", "once", "out_dtype"), LOWERED)
def test_lowers_for_a_gpu(tiling, m, dtypes, once, out_dtype):
    """What the interpreter does not know: layouts, transfers, and that it all fits into shared memory."""
    many = isinstance(tiling, ManyRows)
    n, k = 4096, 4096
    x, w = (jax.ShapeDtypeStruct((rows, k), dtype) for rows, dtype in zip((m, n), dtypes, strict=True))
    x_scale = jax.ShapeDtypeStruct((m, k // 128) if many else (k // 128, m), jnp.uint8)
    w_scale = jax.ShapeDtypeStruct((n // 128, k // 128), jnp.uint8)
    if once:
        x_scale, w_scale = (jax.ShapeDtypeStruct((rows,), jnp.float32) for rows in (m, n))
    run = functools.partial((kernel_sm90 if many else decode_sm90).matmul, tiling=tiling, out_dtype=out_dtype)
    jax.jit(run).trace(x, x_scale, w, w_scale).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("recipe", OP)
@pytest.mark.parametrize(("rows", "dtype"), [(1, jnp.bfloat16), (1, jnp.float32), (4096, jnp.bfloat16)])
def test_the_op_lowers_for_a_gpu(recipe, dtype, rows):
    """V4-Flash's widest and deepest layers, with the tilings they are given."""
    activations, form, _ = OP[recipe]
    for n, k in ((32768, 1024), (4096, 8192)):
        values = jax.ShapeDtypeStruct((n, k), form.values_dtype)
        w = QuantTensor(values, jax.ShapeDtypeStruct(form.scale_shape((n, k)), form.scale_dtype), form)
        run = jax.jit(functools.partial(matmul, activations=activations, implementation="sm90"))
        with pretend(KINDS["H100 / H200"]):
            traced = run.trace(jax.ShapeDtypeStruct((rows, k), dtype), w)
        traced.lower(lowering_platforms=("cuda",))

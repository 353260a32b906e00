"""bfloat16 rows by FP8 weights: the kernel in the interpreter, race detection on, what it refuses, and its tilings."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench import weight_only as bench
from pallas_kernels.block_matmul import api, block_diagonal_matmul, matmul, tilings, weight_only_sm90
from pallas_kernels.block_matmul.cases import BENCH, HOSTILE
from pallas_kernels.block_matmul.problem import Problem
from pallas_kernels.block_matmul.table import TABLE
from pallas_kernels.block_matmul.tilings import weight_only_reason, weight_only_tiling
from pallas_kernels.block_matmul.weight_only_tiling import WeightOnly
from pallas_kernels.device import KINDS, pretend
from pallas_kernels.mosaic import interpreted
from pallas_kernels.mosaic.scales import scale_bytes
from pallas_kernels.quant import FORMATS, FP8_BLOCK, FP8_GROUP, MXFP4, QuantTensor, TreatedWeight
from tests.kernels import sums
from tests.kernels.compiled import dequantize, quantize

H100 = KINDS["H100 / H200"]
FLOAT_BLOCK = dataclasses.replace(FP8_BLOCK, scale="float32", power_of_two=False)
ROW, TENSOR, E5M2 = FORMATS["fp8_row"], FORMATS["fp8_tensor"], FORMATS["e5m2"]
NO_TABLE = TABLE.with_name("none.json")
shape = jax.ShapeDtypeStruct


def operands(m, n, k, form, groups=1):
    """x bfloat16 [m, groups x k] and a weight whose scales differ by powers between blocks."""
    rng = np.random.default_rng(0)
    spread = np.exp2(rng.integers(-6, 6, (-(-n // 128), -(-k // 128)))).repeat(128, 0).repeat(128, 1)[:n, :k]
    w = quantize(jnp.asarray(rng.normal(size=(n, k)) * spread, jnp.float32), form)
    return jnp.asarray(rng.normal(size=(m, groups * k)), jnp.bfloat16), w


@functools.partial(jax.jit, static_argnums=(3, 4))
def multiply(x, values, scale, tiling, out_dtype):
    return weight_only_sm90.matmul(x, values, scale, tiling, out_dtype)


def run(x, w, tiling, out_dtype=jnp.bfloat16):
    scale = scale_bytes(w.scale) if w.format.tile == (128, 128) else w.scale[:, 0]
    with interpreted():
        return np.asarray(multiply(x, w.values, scale, tiling, out_dtype), np.float64)


def expected(x, w):
    return np.asarray(x, np.float64) @ np.asarray(dequantize(w), np.float64).T


def check(y, want, out_dtype=jnp.bfloat16):
    """Weights become float16 or bfloat16, whose products every device adds in float32."""
    sums.check(y, want, out_dtype, bound=2.0**-18 if out_dtype == jnp.float32 else None)


KERNEL = [  # buffers are used again: within a tile, and from tile to tile
    (WeightOnly(8, 1, 128, 2), (8, 192, 512), FP8_BLOCK, jnp.bfloat16),
    (WeightOnly(16, 2, 64, 3), (32, 256, 192), E5M2, jnp.float32),
    (WeightOnly(8, 2, 128, 2, shares=2), (8, 384, 512), FLOAT_BLOCK, jnp.bfloat16),
    (WeightOnly(24, 1, 64, 2, shares=4), (24, 128, 256), ROW, jnp.float32),
    (WeightOnly(64, 2, 128, 2), (128, 128, 128), FLOAT_BLOCK, jnp.float32),
]


@pytest.mark.parametrize(("tiling", "sizes", "form", "out_dtype"), KERNEL)
def test_the_kernel(tiling, sizes, form, out_dtype):
    x, w = operands(*sizes, form)
    assert tiling.shares == 4 or weight_only_reason(tiling, Problem(*sizes), by_block=form is FLOAT_BLOCK) is None
    check(run(x, w, tiling, out_dtype), expected(x, w), out_dtype)


@pytest.mark.parametrize("form", [FP8_BLOCK, E5M2], ids=["e4m3", "e5m2"])
def test_every_code(form):
    """Rows of x with a single one pick columns: bit for bit what dequantising gives, NaN in its row of weights."""
    codes = (np.arange(64)[:, None] + 64 * (np.arange(128) % 4)).astype(np.uint8)
    picks = np.asarray([0, 5, 18, 31, 66, 77, 111, 124])  # each remainder twice, all over the fragments of wgmma
    x = np.zeros((8, 128), np.float32)
    x[np.arange(8), picks] = 1
    scale = jnp.full((1, 1), 2.0**-9, jnp.float8_e8m0fnu)
    values = jax.lax.bitcast_convert_type(jnp.asarray(codes), form.values_dtype)
    w = QuantTensor(jnp.where(jnp.isinf(values), 0, values), scale, form)  # NumPy warns of infinity times zero
    y, dense = run(jnp.asarray(x, jnp.bfloat16), w, WeightOnly(8, 1, 64, 2), jnp.float32), np.asarray(dequantize(w))
    finite = np.isfinite(dense).all(1)
    assert 60 <= finite.sum() < 64 and np.isnan(y[:, ~finite]).all()
    np.testing.assert_array_equal(y[:, finite], dense[finite][:, picks].T)


@pytest.mark.parametrize(("form", "most"), [(FP8_BLOCK, 119), (FLOAT_BLOCK, 110)], ids=["ue8m0", "float32"])
def test_scales_of_every_size(form, most):
    """Blocks from 2^-most to 2^most that meet inputs of the inverse size."""
    exponents = np.asarray([-most, -60, -1, 0, 40, most])
    rng = np.random.default_rng(1)
    x = np.exp2(-exponents).repeat(128) * rng.uniform(1, 2, (8, 768))
    values = jnp.asarray(rng.uniform(1, 300, (64, 768)), form.values_dtype)
    scale = jnp.asarray(np.exp2(exponents)[None], form.scale_dtype)
    x, w = jnp.asarray(x, jnp.bfloat16), QuantTensor(values, scale, form)
    want = np.asarray(x, np.float64) @ (np.asarray(values, np.float64) * np.exp2(exponents).repeat(128)).T
    check(run(x, w, WeightOnly(8, 1, 128, 3), jnp.float32), want, jnp.float32)


@pytest.mark.parametrize("form", [FP8_BLOCK, FLOAT_BLOCK], ids=["ue8m0", "float32"])
def test_nan_of_a_scale(form):
    """It reaches the results of its block, zeros among its codes too, and changes no bit of the others."""
    x, w = operands(8, 192, 512, form)
    w = dataclasses.replace(w, values=w.values.at[128:160, 128:].set(0))
    poisoned = dataclasses.replace(w, scale=w.scale.at[1, 2].set(jnp.nan))
    assert jnp.isnan(poisoned.scale.astype(jnp.float32)).sum() == 1
    want, got = (run(x, weight, WeightOnly(8, 1, 128, 2)) for weight in (w, poisoned))
    assert np.isfinite(want).all() and np.isnan(got[:, 128:]).all()
    np.testing.assert_array_equal(got[:, :128], want[:, :128])


@pytest.mark.parametrize(
    ("rows", "form", "out_dtype"),
    [((5,), FP8_BLOCK, None), ((2, 67), TENSOR, jnp.float32)],
    ids=["few", "many, one scale"],
)
def test_the_op_is_the_reference(rows, form, out_dtype):
    """Rows that are no multiple of anything; NaN stays in its own."""
    x, w = operands(int(np.prod(rows)), 192, 256, form)
    with interpreted():
        got = matmul(x.at[3].set(jnp.nan).reshape(*rows, 256), w, out_dtype=out_dtype, implementation="sm90")
        got.block_until_ready()
    assert got.dtype == (out_dtype or jnp.bfloat16) and got.shape == (*rows, 192)
    got = np.asarray(got, np.float64).reshape(-1, 192)
    assert np.isnan(got[3]).all()
    check(np.delete(got, 3, 0), np.delete(expected(x, w), 3, 0), out_dtype or jnp.bfloat16)


def test_channels_in_16_bits_and_the_gradient():
    x, w = operands(3, 64, 128, FP8_BLOCK)
    channels = jnp.asarray([3, 17], jnp.int32)
    columns = jnp.asarray(np.random.default_rng(2).normal(size=(64, 2)), jnp.bfloat16)
    treated = TreatedWeight(dataclasses.replace(w, values=w.values.at[:, channels].set(0)), None, channels, columns)

    def loss(x, implementation):
        return matmul(x, treated, out_dtype=jnp.float32, implementation=implementation).sum()

    with interpreted():
        got = jax.value_and_grad(loss)(x, "sm90")
        jax.block_until_ready(got)
    want = jax.value_and_grad(loss)(x, "reference")
    np.testing.assert_allclose(got[0], want[0], rtol=1e-4)
    np.testing.assert_array_equal(got[1], want[1])


def test_each_group_has_rows_of_its_own():
    """As the grouped output projection: its input is not rounded."""
    x, w = operands(3, 3 * 192, 128, FP8_BLOCK, groups=3)
    x = x.reshape(3, 3, 128)
    with interpreted():
        got = block_diagonal_matmul(x, w, implementation="sm90").block_until_ready()
    dense = np.asarray(dequantize(w), np.float64).reshape(3, 192, 128)
    check(got, np.einsum("mgk,gnk->mgn", np.asarray(x, np.float64), dense).reshape(3, -1))


def test_a_benchmark_computes_what_it_says():
    case = bench.bench(bench.WeightOnlyCase("small", 3, 64, 128, groups=2))
    sets = case.sets(1)[0]
    want = case.reference(sets)
    assert want.shape == (3, 128) and case.nbytes == 2 * (64 * 128 + 2 * 3 * (128 + 64))
    assert case.usual in case.ours and case.ours.keys() == case.choices.keys()
    with interpreted():
        assert case.wrong(jax.block_until_ready(case.ours[case.usual](sets)), want) is None
    assert case.wrong(case.xla["dequantised bf16"](sets), want) is None


def stored(form, *sizes):
    values = shape(form.values_shape(sizes), form.values_dtype)
    return QuantTensor(values, shape(form.scale_shape(sizes), form.scale_dtype), form)


def choice(form=FP8_BLOCK, n=256, k=256, rows=8, dtype=jnp.bfloat16, **how):
    """(what runs, what sm90 refused: None where it runs)."""
    w = shape((n, k), jnp.bfloat16) if form is None else stored(form, n, k)
    candidate, refusals = api.MATMUL.choose((shape((rows, k), dtype), w), how)
    return candidate.name, refusals[0].removeprefix("sm90: ") if refusals else None


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"form": None}, "the weight is not quantised"),
        ({"form": MXFP4}, "weights are e2m1:1x32:ue8m0: it takes e4m3 or e5m2, scales of 128 x 128 blocks"),
        ({"dtype": jnp.float32}, "activations are float32 and not quantised: by unrounded ones it takes bfloat16"),
        ({"form": dataclasses.replace(FLOAT_BLOCK, scale="bfloat16")}, "scales of blocks are bfloat16"),
        ({"n": 96}, "no tiling fits weights [96, 256]: multiples of 64"),
        ({"k": 96}, "no tiling fits weights [256, 96]: multiples of 64"),
        ({"k": 192, "form": FLOAT_BLOCK}, "no tiling fits weights [256, 192]: multiples of 64, of 128 along K with"),
        ({"rows": 0}, "there are no rows"),
        ({"out_dtype": jnp.float16}, "results in float16: it writes bfloat16 and float32"),
    ],
)
def test_what_it_refuses(call, reason):
    with pretend(H100):
        ran, found = choice(**call)
    assert ran == "reference" and found is not None and found.startswith(reason)


def test_what_it_takes():
    """Half a block of K too, where one scale is all that K has."""
    with pretend(H100):
        for form in (FP8_BLOCK, FLOAT_BLOCK, E5M2, ROW, TENSOR):
            assert choice(form) == ("sm90", None)
        assert choice(k=64) == choice(n=64, k=192) == ("sm90", None)
        assert choice(activations=FP8_GROUP, k=64) == ("sm90", None)
        _, refused = choice(activations=FP8_GROUP, n=32768, k=192)
        assert refused is not None and refused.startswith("K = 192 is no multiple of 128, and to fill up")
        groups = shape((4, 8, 4096), jnp.bfloat16), stored(FP8_BLOCK, 8192, 4096)
        assert api.BLOCK_DIAGONAL.choose(groups, {})[0].name == "sm90"
        narrow = shape((4, 8, 256), jnp.bfloat16), stored(FP8_BLOCK, 256, 256)
        candidate, refusals = api.BLOCK_DIAGONAL.choose(narrow, {})
        assert candidate.name == "reference" and "no tiling fits weights [32, 256]" in refusals[0]


@pytest.mark.parametrize("rows", [1, 128, 4096])
def test_lowers_for_a_gpu(rows):
    """What the interpreter does not know: layouts, transfers, and that the tilings fit into shared memory."""
    calls = [
        (matmul, (rows, 1024), (32768, 1024), FP8_BLOCK, jnp.bfloat16),
        (matmul, (rows, 4096), (1024, 4096), FLOAT_BLOCK, jnp.bfloat16),
        (matmul, (rows, 4096), (512, 4096), ROW, jnp.float32),
        (block_diagonal_matmul, (rows, 8, 4096), (8192, 4096), FP8_BLOCK, None),
    ]
    for op, of_x, of_w, form, out_dtype in calls:
        how = {} if out_dtype is None else {"out_dtype": out_dtype}
        with pretend(H100):
            traced = jax.jit(functools.partial(op, implementation="sm90", **how)).trace(
                shape(of_x, jnp.bfloat16), stored(form, *of_w)
            )
        traced.lower(lowering_platforms=("cuda",))


def test_every_case_has_a_tiling():
    for case in (*BENCH, *HOSTILE):
        problem = Problem(case.m, case.n, case.k)
        for table in (TABLE, NO_TABLE):
            found = weight_only_tiling(problem, table)
            assert found and tilings.reason(found, problem) is None
        by_block = weight_only_tiling(problem, NO_TABLE, by_block=True)
        assert by_block and by_block.depth == 128 and by_block.tokens <= 128
        wide = weight_only_tiling(problem, NO_TABLE, out_bytes=4)
        assert wide and weight_only_reason(wide, problem, out_bytes=4) is None


def test_few_weights_are_shared_out():
    """And large products are cut into large tiles."""
    few, many = (weight_only_tiling(Problem(m, 1024, 4096), NO_TABLE) for m in (1, 4096))
    assert few and many and (few.tokens, few.shares, many.tokens, many.shares) == (8, 8, 256, 1)


@pytest.mark.parametrize(
    ("tiling", "how", "reason"),
    [
        (WeightOnly(depth=64), {"by_block": True}, "stages of 64: 128"),
        (WeightOnly(depth=256), {}, "stages of 256: 128 or 64"),
        (WeightOnly(warpgroups=4, registers=104), {}, "no multiples of [256, 128]"),
        (WeightOnly(12), {}, "12 tokens: a multiple of 8"),
        (WeightOnly(256, depth=64, stages=2), {"by_block": False}, None),
        (WeightOnly(256, stages=2), {"by_block": True}, "256 registers of sums of 232"),
        (WeightOnly(shares=16), {}, "no multiples of"),
        (WeightOnly(64, stages=16), {}, "bytes of shared memory"),
        (WeightOnly(stages=1), {}, "in 1 stages"),
    ],
)
def test_tilings_that_do_not_fit(tiling, how, reason):
    found = weight_only_reason(tiling, Problem(8, 192, 512), **how)
    assert found is None if reason is None else reason in found


def test_more_registers_than_there_are():
    with pytest.raises(ValueError, match="registers"):
        WeightOnly(warpgroups=4)

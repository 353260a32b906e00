"""The MXFP4 kernel for few rows in the interpreter, race detection on, and lowered for a GPU that need not be there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_matmul import fp4_sm90
from pallas_kernels.block_matmul.kernel_sm90 import RowBlocks
from pallas_kernels.block_matmul.tiling import FewRows
from pallas_kernels.mosaic import e2m1, interpreted, scales
from pallas_kernels.mosaic.scales import scale_bytes
from pallas_kernels.quant import FP8_GROUP, MXFP4, QuantTensor, dequantize, quantize

RANDOM = np.random.default_rng(0)


def quantized(shape, form, low=-6, high=6, seed=0):
    """Normal numbers with scales of 2^low to 2^high between groups."""
    rng = np.random.default_rng(seed)
    tile = form.tile[1]
    spread = np.exp2(rng.integers(low, high, (*shape[:-1], shape[-1] // tile))).repeat(tile, -1)
    return quantize(jnp.asarray(rng.normal(size=shape) * spread, jnp.float32), form)


def exact(x):
    return np.asarray(dequantize(x), np.float64)


def stored(x):
    return x.values, scale_bytes(x.scale)


def check(y, want, out_dtype=jnp.bfloat16):
    """The one tolerance for matmuls with bfloat16 results; float32 ones are summed in another order only."""
    error, want = np.abs(np.asarray(y, np.float64) - want), np.abs(want)
    rms = np.sqrt(np.mean(want**2))
    bound = 2.0**-8 if out_dtype == jnp.bfloat16 else 2.0**-18
    assert np.sqrt(np.mean(error**2)) <= 3e-3 * rms
    assert (error <= bound * (want + rms)).all()


@pytest.mark.parametrize(
    ("tiling", "shape"),
    [  # buffers are used again: within a tile, and from tile to tile
        (FewRows(4, 2, 1), (8, 320, 512)),
        (FewRows(4, 3, 2), (24, 128, 2048)),
        (FewRows(8, 2, 1), (16, 64, 1024)),
        (FewRows(4, 2, 1), (64, 64, 512)),
    ],
)
def test_few_rows(tiling, shape):
    m, n, k = shape
    x, w = quantized((m, k), FP8_GROUP), quantized((n, k), MXFP4, seed=1)
    (values, scale), (w_values, w_scale) = stored(x), stored(w)
    with interpreted():
        y = fp4_sm90.matmul(values, scale.T, w_values, w_scale, tiling)
        y.block_until_ready()
    check(y, exact(x) @ exact(w).T)


@pytest.mark.parametrize("kind", ["ue8m0", "float32"])
def test_float32_results_and_scales(kind):
    x, w = quantized((8, 512), FP8_GROUP), quantized((64, 512), MXFP4, seed=1)
    values, scale = stored(x)
    want = exact(x) @ exact(w).T
    if kind == "float32":  # any number, not only powers of two
        scale = jnp.exp2(scale.astype(jnp.float32) - 127) * 1.37
        want = want * float(np.float32(1.37))
    with interpreted():
        y = fp4_sm90.matmul(values, scale.T, *stored(w), FewRows(4, 2), jnp.float32)
        y.block_until_ready()
    check(y, want, jnp.float32)


def test_every_code_in_every_place():
    """Rows of x with a single one pick columns of w: bit for bit what dequantising gives."""
    packed = np.arange(64 * 256, dtype=np.uint32).reshape(64, 256) * 37 % 256
    codes = np.stack([np.roll(packed, i, 1) for i in range(64)])[np.arange(64), np.arange(64)].astype(np.uint8)
    assert len(np.unique(codes)) == 256
    w = QuantTensor(jnp.asarray(codes), jnp.full((64, 16), 2.0**3, jnp.float8_e8m0fnu), MXFP4)
    picks = np.stack([RANDOM.permutation(512)[:128] for _ in range(2)]).reshape(-1)
    picks[: 2 * e2m1.STEP] = np.arange(2 * e2m1.STEP)  # one whole K step, and the next
    x = np.zeros((len(picks), 512), np.float32)
    x[np.arange(len(picks)), picks] = 1
    with interpreted():
        ones = jnp.full((4, len(picks)), 127, jnp.uint8)
        y = fp4_sm90.matmul(jnp.asarray(x, jnp.float8_e4m3fn), ones, *stored(w), FewRows(4, 2), jnp.float32)
        y = np.asarray(y)
    np.testing.assert_array_equal(y, np.asarray(dequantize(w))[:, picks].T)


def test_scales_of_every_size():
    """Groups whose two scales multiply to a moderate one, whatever each is: 2^-127 to 2^127 either way round."""
    m, n, k = 8, 64, 2048
    rng = np.random.default_rng(3)
    codes = rng.permutation(np.concatenate([[0, 1, 2, 6, 120, 127, 133, 248], np.arange(250, 255), [64, 190, 200]]))
    of_block = np.broadcast_to(254 - codes, (m, k // 128))
    of_group = codes.repeat(4) + rng.integers(-3, 4, (n, k // 32))
    of_group = np.clip(of_group, 0, 254)
    x = rng.normal(size=(m, k)).astype(jnp.float8_e4m3fn)
    packed = rng.integers(0, 256, (n, k // 2), np.uint8)
    unscaled = QuantTensor(jnp.asarray(packed), jnp.ones((n, k // 32), jnp.float8_e8m0fnu), MXFP4)
    products = (x.astype(np.float64)[:, None] * exact(unscaled)).reshape(m, n, k // 32, 32).sum(-1)
    exponents = of_block.repeat(4, 1)[:, None] + of_group - 254
    want = (products * np.exp2(exponents.astype(np.float64))).sum(-1)
    x_scale, w_scale = (jnp.asarray(codes, jnp.uint8) for codes in (of_block.T, of_group))
    with interpreted():
        y = fp4_sm90.matmul(jnp.asarray(x), x_scale, jnp.asarray(packed), w_scale, FewRows(4, 2), jnp.float32)
        y.block_until_ready()
    check(y, want, jnp.float32)


def test_products_of_scales_are_those_of_the_other_kernels():
    tokens = jnp.arange(256, dtype=jnp.uint8)
    rows = jnp.asarray(RANDOM.integers(0, 255, 64), jnp.uint8)
    with interpreted():
        bits = jnp.maximum(rows.astype(jnp.int32) << 23, 1 << 22)
        got = e2m1.scale_product(bits, tokens)
    want = np.stack([scales.scale_product(tokens, row) for row in rows])
    np.testing.assert_array_equal(got, want)


def test_a_row_does_not_depend_on_the_others():
    """NaN in one row stays there, and the bits of the rest are those of another batch."""
    x, w = quantized((16, 512), FP8_GROUP), quantized((64, 512), MXFP4, seed=1)
    poisoned = x.values.at[3].set(jnp.nan)
    other = x.values.at[8:].set(x.values[:8])
    run = functools.partial(fp4_sm90.matmul, tiling=FewRows(4, 2))
    with interpreted():
        scale, weight = scale_bytes(x.scale).T, stored(w)
        a, b, c = (np.asarray(run(v, scale, *weight), np.float32) for v in (x.values, poisoned, other))
    assert np.isnan(b[3]).all()
    np.testing.assert_array_equal(np.delete(a, 3, 0), np.delete(b, 3, 0))
    np.testing.assert_array_equal(a[:8], c[:8])


def swiglu(gate, up, factor):
    hidden = gate / (1 + jnp.exp(-gate)) * up
    return hidden * jax.lax.broadcast_in_dim(factor, hidden.shape, (1,))


@pytest.mark.parametrize(("rows", "tiling"), [(8, FewRows(4, 1, 2)), (16, FewRows(4, 3, 1))])
def test_rows_grouped_by_expert_and_two_weights(rows, tiling):
    """Experts without rows, one with two blocks, NaN in padding rows, blocks that are not real."""
    experts, n, k = 5, 128, 512
    expert, real = np.array([1, 3, 3, 4, 0, 0], np.int32), 4
    filled = np.array([3, rows, 2, rows - 1, 0, 0])
    m = rows * len(expert)
    x = quantized((m, k), FP8_GROUP)
    gate, up = (quantized((experts, n, k), MXFP4, -8, -5, seed=seed) for seed in (1, 2))
    factors = RANDOM.uniform(0.2, 1.5, m).astype(np.float32)
    padding = (np.arange(m) % rows) >= filled.repeat(rows)
    values = jnp.where(padding[:, None], jnp.nan, x.values.astype(jnp.float32)).astype(x.values.dtype)
    with interpreted():
        y = fp4_sm90.few_rows(
            values, scale_bytes(x.scale).T, [stored(gate), stored(up)], tiling, rows=rows, out_dtype=jnp.bfloat16,
            row_blocks=RowBlocks(jnp.asarray(expert), jnp.asarray([real], jnp.int32)), factors=jnp.asarray(factors),
            epilogue=swiglu,
        )  # fmt: skip
        y = np.asarray(y, np.float64)
    of_row = expert.repeat(rows)
    gate, up = (np.einsum("mk,mnk->nm", exact(x), exact(w)[of_row]).astype(np.float32) for w in (gate, up))
    want = np.asarray(swiglu(gate, up, jnp.asarray(factors))).T
    chosen = ~padding & (np.arange(m) < real * rows)
    check(y[chosen], want[chosen].astype(np.float64))


@pytest.mark.parametrize(
    ("rows", "count", "scale", "tiling"),
    [
        (8, 1, jnp.uint8, FewRows(4, 5, 2)),
        (16, 1, jnp.float32, FewRows(4, 4, 2, 208)),
        (8, 2, jnp.uint8, FewRows(4, 3, 2, 208)),
        (32, 1, jnp.uint8, FewRows(8, 2, 2, 208)),
    ],
)
def test_lowers_for_a_gpu(rows, count, scale, tiling):
    """What the interpreter does not know: layouts, transfers, fragments, and that it all fits into shared memory."""
    experts, n, k = 256, 4096, 4096
    m, shape = experts * rows, jax.ShapeDtypeStruct
    pair = shape((experts, n, k // 2), jnp.uint8), shape((experts, n, k // 32), jnp.uint8)

    def run(x, x_scale, weights, expert, real, factors):
        return fp4_sm90.few_rows(
            x, x_scale, weights, tiling, rows=rows, out_dtype=jnp.bfloat16, row_blocks=RowBlocks(expert, real),
            factors=factors, epilogue=swiglu if count == 2 else lambda sums, factors: sums,
        )  # fmt: skip

    x, x_scale = shape((m, k), jnp.float8_e4m3fn), shape((k // 128, m), scale)
    blocks = shape((experts,), jnp.int32), shape((1,), jnp.int32), shape((m,), jnp.float32)
    jax.jit(run).trace(x, x_scale, [pair] * count, *blocks).lower(lowering_platforms=("cuda",))

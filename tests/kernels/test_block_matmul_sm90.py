"""The Hopper matmul kernels in the interpreter, race detection on, and lowered for a GPU that need not be there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_matmul import decode_sm90, kernel_sm90
from pallas_kernels.block_matmul.tiling import FewRows, ManyRows
from pallas_kernels.mosaic import interpreted
from pallas_kernels.mosaic.scales import scale_bytes
from pallas_kernels.quant import FP8_BLOCK, FP8_GROUP, dequantize, quantize

MANY = [
    (ManyRows(128, 256, 3, "columns"), (256, 512, 640)),
    (ManyRows(128, 128, 3, "rows"), (256, 384, 256)),
    (ManyRows(64, 256, 2, "columns", rows_first=False, width=1), (192, 512, 128)),
]
FEW = [
    (FewRows(blocks=2, stages=3, warpgroups=1), (8, 192, 768)),
    (FewRows(blocks=4, stages=2, warpgroups=2), (64, 384, 1024)),
    (FewRows(blocks=1, stages=4, warpgroups=2), (24, 128, 128)),
]


def operands(m, n, k, seed=0):
    """Quantised x [m, k] and w [n, k], with scales from 2^-20 to 2^12 between blocks."""
    rng = np.random.default_rng(seed)
    spread = np.exp2(rng.integers(-14, 6, (m, k // 128))).repeat(128, 1)
    x = quantize(jnp.asarray(rng.normal(size=(m, k)) * spread, jnp.float32), FP8_GROUP)
    spread = np.exp2(rng.integers(-6, 6, (-(-n // 128), k // 128))).repeat(128, 0).repeat(128, 1)[:n]
    w = quantize(jnp.asarray(rng.normal(size=(n, k)) * spread, jnp.float32), FP8_BLOCK)
    return x, w


def expected(x, w):
    return np.asarray(dequantize(x), np.float64) @ np.asarray(dequantize(w), np.float64).T


def check(y, want, out_dtype=jnp.bfloat16):
    """The one tolerance for matmuls with bfloat16 results; float32 ones are summed in another order only."""
    error, want = np.abs(np.asarray(y, np.float64) - want), np.abs(want)
    rms = np.sqrt(np.mean(want**2))
    bound = 2.0**-8 if out_dtype == jnp.bfloat16 else 2.0**-18
    assert np.sqrt(np.mean(error**2)) <= 3e-3 * rms
    assert (error <= bound * (want + rms)).all()


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


@pytest.mark.parametrize("tiling", [ManyRows(), ManyRows(128, 128, 6, "rows"), FewRows(), FewRows(4, 3, 2)])
def test_lowers_for_a_gpu(tiling):
    """What the interpreter does not know: layouts, transfers, and that it all fits into shared memory."""
    many = isinstance(tiling, ManyRows)
    m, n, k = 4096 if many else 8, 4096, 4096
    f8 = jnp.float8_e4m3fn
    x, w = jax.ShapeDtypeStruct((m, k), f8), jax.ShapeDtypeStruct((n, k), f8)
    x_scale = jax.ShapeDtypeStruct((m, k // 128) if many else (k // 128, m), jnp.uint8)
    w_scale = jax.ShapeDtypeStruct((n // 128, k // 128), jnp.uint8)
    run = functools.partial((kernel_sm90 if many else decode_sm90).matmul, tiling=tiling)
    jax.jit(run).trace(x, x_scale, w, w_scale).lower(lowering_platforms=("cuda",))

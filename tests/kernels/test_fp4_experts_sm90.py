"""Experts with MXFP4 weights on Hopper: the kernel and the layer in the interpreter, race detection on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench import expert_layer, mxfp4
from pallas_kernels.bench.case import disagreement
from pallas_kernels.block_matmul.problem import Problem
from pallas_kernels.block_matmul.row_blocks import RowBlocks
from pallas_kernels.formats import QuantFormat
from pallas_kernels.grouped_matmul import experts, tilings
from pallas_kernels.grouped_matmul.cases import GroupedCase, LayerCase
from pallas_kernels.grouped_matmul.fp4_sm90 import expert_rows
from pallas_kernels.grouped_matmul.rows_sm90 import arranged, scales_shape
from pallas_kernels.grouped_matmul.tiling import INVARIANT_BLOCKS, Mxfp4Rows, default_mxfp4, mxfp4_reason
from pallas_kernels.mosaic import e2m1_folded as e2m1
from pallas_kernels.mosaic import interpreted
from pallas_kernels.mosaic.scales import scale_bytes
from pallas_kernels.quant import FP8_GROUP, MXFP4, QuantTensor
from pallas_kernels.router import Routing
from tests.kernels.compiled import dequantize, quantize, round_trip
from tests.kernels.sums import check

RANDOM = np.random.default_rng(0)
FLOAT_GROUP = QuantFormat("e4m3", (1, 128), "float32", floor=1e-4)
NEAR, FAR = (-3, 3), (-14, 14)  # powers of two between groups: within what a table holds, and beyond it


def quantized(shape, form, spread=NEAR, seed=0):
    """Normal numbers, groups of a row apart by powers of two."""
    rng, tile = np.random.default_rng(seed), form.tile[1]
    apart = np.exp2(rng.integers(*spread, (*shape[:-1], shape[-1] // tile))).repeat(tile, -1)
    return quantize(jnp.asarray(rng.normal(size=shape) * apart, jnp.float32), form)


def exact(x):
    return np.asarray(dequantize(x), np.float64)


def stored(w):
    return w.values, scale_bytes(w.scale)


def row_blocks(expert, real=None):
    return RowBlocks(jnp.asarray(expert, jnp.int32), jnp.asarray([len(expert) if real is None else real], jnp.int32))


def of_one_expert(x, x_scale, w, w_scale, tiling, rows=None, out_dtype=jnp.float32):
    """y [M, N] of x [M, K] and one weight [N, K]."""
    rows = rows or len(x)
    how = {"rows": rows, "out_dtype": out_dtype, "row_blocks": row_blocks([0] * (len(x) // rows))}
    return expert_rows(*arranged(x, x_scale.T, rows, folded=tiling.folded), [(w[None], w_scale[None])], tiling, **how)


def gated(gate, up, factor):
    hidden = gate / (1 + jnp.exp(-gate)) * up
    return hidden * jax.lax.broadcast_in_dim(factor, hidden.shape, (1,))


@pytest.mark.parametrize(
    ("rows", "k", "tiling", "spread"),
    [  # buffers are used again: within a tile, and from tile to tile
        (8, 1024, Mxfp4Rows(4, 1, 1), NEAR),
        (16, 512, Mxfp4Rows(2, 3, 1), FAR),
        (72, 512, Mxfp4Rows(1, 3, 2), NEAR),
        (40, 512, Mxfp4Rows(2, 2, 1, parts=2), FAR),
        (8, 1024, Mxfp4Rows(1, 3, 1, folded=False), FAR),  # 32 columns a product
        (16, 1024, Mxfp4Rows(4, 2, 4, shares=2, folded=False), NEAR),  # consumers that take turns
        (8, 3072, Mxfp4Rows(4, 4, 2, shares=2, folded=False), NEAR),  # three stages each, in two buffers
    ],
)
def test_two_weights_of_experts(rows, k, tiling, spread):
    """An expert with two blocks, others without rows, NaN in padding rows, a block that is not real."""
    count, n = 4, 128
    expert, real = np.array([3, 3, 0], np.int32), 2
    filled = np.array([rows, 3, 0])
    m = rows * len(expert)
    x = quantized((m, k), FP8_GROUP)
    gate, up = (quantized((count, n, k), MXFP4, spread, seed) for seed in (1, 2))
    gate, up = (QuantTensor(w.values, w.scale * jnp.asarray(2.0**-9, w.scale.dtype), MXFP4) for w in (gate, up))
    factors = RANDOM.uniform(0.2, 1.5, m).astype(np.float32)
    padding = (np.arange(m) % rows) >= filled.repeat(rows)
    values = jnp.where(padding[:, None], jnp.nan, x.values.astype(jnp.float32)).astype(x.values.dtype)
    with interpreted():
        y = expert_rows(
            *arranged(values, scale_bytes(x.scale), rows, folded=tiling.folded), [stored(gate), stored(up)], tiling,
            rows=rows, out_dtype=jnp.bfloat16, row_blocks=row_blocks(expert, real), factors=jnp.asarray(factors),
            epilogue=gated,
        )  # fmt: skip
        y = np.asarray(y)
    of_row = expert.repeat(rows)
    gate, up = (np.einsum("mk,mnk->nm", exact(x), exact(w)[of_row]).astype(np.float32) for w in (gate, up))
    want = np.asarray(gated(gate, up, jnp.asarray(factors))).T
    chosen = ~padding & (np.arange(m) < real * rows)
    check(y[chosen], want[chosen].astype(np.float64))


@pytest.mark.parametrize(
    ("rows", "tiling", "form"),
    [
        (8, Mxfp4Rows(4, 2, 2), FLOAT_GROUP),
        (16, Mxfp4Rows(2, 2, 1, parts=2), FP8_GROUP),
        (24, Mxfp4Rows(1, 2, 4), FP8_GROUP),  # six pieces of eight tokens for four consumers
        (8, Mxfp4Rows(4, 2, 4, shares=2, folded=False), FP8_GROUP),
    ],
)
def test_results_as_codes(rows, tiling, form):
    """What quantising the bfloat16 results gives, bit for bit; one factor for a block, which share their rows of x."""
    k = 512 * tiling.shares
    x, w = quantized((rows, k), FP8_GROUP), quantized((3, 256, k), MXFP4)
    how = {"rows": rows, "row_blocks": row_blocks([2, 0]), "factors": jnp.asarray([0.5, -3.0])}
    how["epilogue"] = lambda sums, factors: sums * jax.lax.broadcast_in_dim(factors, sums.shape, (1,))
    with interpreted():
        arguments = *arranged(x.values, scale_bytes(x.scale), rows, folded=tiling.folded), [stored(w)], tiling
        y = np.asarray(expert_rows(*arguments, out_dtype=jnp.bfloat16, **how))
        made = expert_rows(*arguments, out_dtype=form, next_folded=tiling.folded, **how)
        codes, scale = (np.asarray(found) for found in made)
    want = quantize(jnp.asarray(y), form)
    want_codes, want_scale = arranged(want.values, scale_bytes(want.scale), rows, folded=tiling.folded)
    np.testing.assert_array_equal(codes.view(np.uint8), np.asarray(want_codes).view(np.uint8))
    np.testing.assert_array_equal(scale[..., :rows], want_scale[..., :rows])


@pytest.mark.parametrize("folded", [True, False])
def test_every_code_and_scale_in_every_place(folded):
    """Rows of x with a single one pick columns of w: bit for bit what dequantising gives."""
    packed = np.arange(64 * 256, dtype=np.uint32).reshape(64, 256) * 37 % 256
    codes = np.stack([np.roll(packed, i, 1) for i in range(64)])[np.arange(64), np.arange(64)].astype(np.uint8)
    assert len(np.unique(codes)) == 256
    scales = 120 + RANDOM.integers(0, e2m1.SPREAD + 1, (64, 16)).astype(np.uint8)
    assert np.ptp(scales.reshape(64, 4, 4), axis=-1).max() == e2m1.SPREAD
    w = QuantTensor(jnp.asarray(codes), jax.lax.bitcast_convert_type(jnp.asarray(scales), jnp.float8_e8m0fnu), MXFP4)
    picks = np.stack([RANDOM.permutation(512)[:56] for _ in range(2)]).reshape(-1)
    picks[: 2 * e2m1.GROUP] = np.arange(2 * e2m1.GROUP)  # one whole K step, and the next
    rows = len(picks) if folded else 16
    x = np.zeros((len(picks), 512), np.float32)
    x[np.arange(len(picks)), picks] = 1
    with interpreted():
        ones = jnp.full((4, len(picks)), 127, jnp.uint8)
        tiling = Mxfp4Rows(4, 2, 1, folded=folded)
        y = of_one_expert(jnp.asarray(x, jnp.float8_e4m3fn), ones, *stored(w), tiling, rows)
        y = np.asarray(y)
    np.testing.assert_array_equal(y, np.asarray(dequantize(w))[:, picks].T)


@pytest.mark.parametrize(
    ("apart", "tiling"),
    [(2, Mxfp4Rows(4, 2, 1)), (30, Mxfp4Rows(4, 4, 4, shares=4)), (30, Mxfp4Rows(2, 2, 1, folded=False))],
    ids=["near", "far, by turns", "far, apart"],
)
def test_scales_of_every_size(apart, tiling):
    """Groups whose two scales multiply to a moderate one, whatever each is: 2^-127 to 2^127 either way round."""
    m, n, k = 8, 64, 2048
    rng = np.random.default_rng(3)
    codes = rng.permutation(np.concatenate([[0, 1, 2, 6, 120, 127, 133, 248], np.arange(250, 255), [64, 190, 200]]))
    of_block = np.broadcast_to(254 - codes, (m, k // 128))
    of_group = np.clip(codes.repeat(4) + rng.integers(-apart, apart + 1, (n, k // 32)), 0, 254)
    x = rng.normal(size=(m, k)).astype(jnp.float8_e4m3fn)
    packed = rng.integers(0, 256, (n, k // 2), np.uint8)
    unscaled = QuantTensor(jnp.asarray(packed), jnp.ones((n, k // 32), jnp.float8_e8m0fnu), MXFP4)
    products = (x.astype(np.float64)[:, None] * exact(unscaled)).reshape(m, n, k // 32, 32).sum(-1)
    exponents = of_block.repeat(4, 1)[:, None] + of_group - 254
    want = (products * np.exp2(exponents.astype(np.float64))).sum(-1)
    x_scale, w_scale = (jnp.asarray(codes, jnp.uint8) for codes in (of_block.T, of_group))
    with interpreted():
        y = of_one_expert(jnp.asarray(x), x_scale, jnp.asarray(packed), w_scale, tiling)
        y.block_until_ready()
    check(y, want, jnp.float32)


@pytest.mark.parametrize(
    ("form", "beside", "folded"),
    [(FP8_GROUP, 127, True), (FLOAT_GROUP, 127, True), (FP8_GROUP, 245, True), (FP8_GROUP, 127, False)],
    ids=["far", "far, float32", "near", "apart"],
)
def test_nan_of_a_weight_scale(form, beside, folded):
    """It reaches the results of its row of weights, of which a clamp makes no numbers; others are right.

    Scales beside it are 2^(beside - 127): the last ones are within what a table holds of the code 255.
    """
    x, w = quantized((8, 512), form), quantized((64, 512), MXFP4, seed=1)
    scale = scale_bytes(w.scale).at[:, 4:8].set(beside)
    if beside > 127:
        x = dataclasses.replace(x, scale=x.scale * jnp.asarray(2.0**-110, x.scale.dtype))
    poisoned = np.asarray([0, 9, 63])
    pair = w.values[None], scale.at[poisoned, 6].set(255)[None]
    how = {"out_dtype": jnp.float32, "row_blocks": row_blocks([0]), "epilogue": lambda sums, _: jnp.clip(sums, -9, 9)}
    with interpreted():
        tiling = Mxfp4Rows(2, 2, 1, folded=folded)
        y = expert_rows(*arranged(x.values, scale_bytes(x.scale), 8, folded=folded), [pair], tiling, rows=8, **how)
        y = np.asarray(y)
    w = dataclasses.replace(w, scale=jax.lax.bitcast_convert_type(scale, w.scale.dtype))
    want = np.clip(exact(x) @ exact(w).T, -9, 9)
    assert np.isnan(y[:, poisoned]).all() and np.std(want) > 1
    check(np.delete(y, poisoned, 1), np.delete(want, poisoned, 1), jnp.float32)


@pytest.mark.parametrize("spread", [NEAR, FAR], ids=["near", "far"])
def test_a_row_does_not_depend_on_the_others(spread):
    """NaN in one row stays there, and the bits of the rest are those of blocks of another size."""
    x, w = quantized((48, 512), FP8_GROUP), quantized((64, 512), MXFP4, spread, seed=1)
    poisoned = x.values.at[3].set(jnp.nan)
    scale, pair = scale_bytes(x.scale).T, stored(w)
    with interpreted():
        a = np.asarray(of_one_expert(x.values, scale, *pair, Mxfp4Rows(2, 2, 1)))
        b = np.asarray(of_one_expert(poisoned[:8], scale[:, :8], *pair, Mxfp4Rows(2, 3, 1)))
    assert np.isnan(b[3]).all() and np.isfinite(a).all()
    np.testing.assert_array_equal(np.delete(a[:8], 3, 0), np.delete(b, 3, 0))


E, D, I = 4, 512, 512  # noqa: E741


@functools.cache
def weights():
    shapes = ((E, I, D), (E, I, D), (E, D, I))
    found = [quantized(shape, MXFP4, NEAR, seed) for seed, shape in enumerate(shapes)]
    return [QuantTensor(w.values, w.scale * jnp.asarray(2.0**-5, w.scale.dtype), MXFP4) for w in found]


def routing_of(chosen):
    """Of experts int [N, k], with random weights."""
    chosen = np.asarray(chosen, np.int32)
    factors = np.random.default_rng(1).uniform(0.2, 1.5, chosen.shape).astype(np.float32)
    flat = chosen.reshape(-1)
    counts, order = np.bincount(flat, minlength=E), np.argsort(flat, kind="stable")
    counts, order = (jnp.asarray(x, jnp.int32) for x in (counts, order))
    return Routing(jnp.asarray(chosen), jnp.asarray(factors), jnp.zeros((len(chosen), E)), counts, order)


def layer(x, routing, activations):
    """float64 on the dequantised operands, hidden rows rounded as between the two kernels."""
    w1, w3, w2 = (exact(w) for w in weights())
    rows, want = np.asarray(round_trip(x.astype(jnp.float32), activations), np.float64), np.zeros(x.shape)
    for slot, of_token in enumerate(np.asarray(routing.experts).T):
        gate, up = (np.einsum("nd,nid->ni", rows, w[of_token]) for w in (w1, w3))
        hidden = jax.nn.silu(jnp.minimum(gate, 2.0)) * jnp.clip(up, -2.0, 2.0) * routing.weights[:, slot, None]
        hidden = round_trip(hidden.astype(x.dtype).astype(jnp.float32), activations)
        want += np.einsum("ni,ndi->nd", np.asarray(hidden, np.float64), w2[of_token])
    return want


@pytest.mark.parametrize(
    ("chosen", "activations", "dtype"),
    [
        ([[3, 1]], FP8_GROUP, jnp.bfloat16),
        ([[0, 2], [2, 0]], FLOAT_GROUP, jnp.bfloat16),
        ([[3]] * 40, FP8_GROUP, jnp.float32),
    ],
    ids=["one token", "empty experts", "all rows to one expert"],
)
def test_layers_of_experts(chosen, activations, dtype):
    """Gather, gate and up, SwiGLU, re-quantise, down and combine, all weights packed."""
    routing = routing_of(chosen)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(len(chosen), D)), dtype)
    with interpreted():
        got = experts(x, *weights(), routing, limit=2.0, activations=activations, implementation="sm90")
        got.block_until_ready()
    assert got.dtype == dtype
    got, want = np.asarray(got, np.float64), layer(x, routing, activations)
    rms = np.sqrt(np.mean(want**2))
    # A last bit of a hidden row may choose another FP8 code; it does so in few of them.
    assert np.sqrt(np.mean((got - want) ** 2)) <= 1e-2 * rms
    assert np.median(np.abs(got - want)) <= 3e-3 * rms


def test_tilings():
    """Of every block that is tried; those that promise the same bits have stages of the same length."""
    for rows in tilings.MXFP4_ROWS:
        for count in (1, 2):
            problem, how = Problem(768, 2048, 4096, count, 256, rows), {"experts": 256, "rows": rows}
            assert mxfp4_reason(tilings.mxfp4_tiling(768, 2048, 4096, count, **how), problem) is None
            found = tilings.mxfp4_tiling(768, 2048, 4096, count, batch_invariant=True, **how)
            assert mxfp4_reason(found, problem) is None and found.blocks == INVARIANT_BLOCKS
    assert default_mxfp4(Problem(8, 64, 512, rows=8)).warpgroups == 1
    assert "multiples of [64, 512]" in mxfp4_reason(Mxfp4Rows(1, 2, 1), Problem(8, 64, 256, rows=8))
    assert "at most 256" in mxfp4_reason(Mxfp4Rows(1, 2, 1), Problem(12, 64, 512, rows=12))
    assert "shared memory" in mxfp4_reason(Mxfp4Rows(4, 8, 2), Problem(8, 128, 512, rows=8))
    assert default_mxfp4(Problem(112, 512, 512, rows=112)) == Mxfp4Rows(1, 4, 2, parts=2)
    assert default_mxfp4(Problem(112, 512, 512, 2, rows=112)) == Mxfp4Rows(1, 4, 2)
    for count in (1, 2):  # what a row's bits go by is the same for blocks of any size
        problems = [Problem(768, 2048, 4096, count, 256, rows) for rows in tilings.MXFP4_ROWS]
        assert all(default_mxfp4(problem, batch_invariant=True).in_one_order for problem in problems)
    assert not Mxfp4Rows(INVARIANT_BLOCKS, parts=2).in_one_order  # both take four passes if one has to
    team = Mxfp4Rows(4, 2, 2, shares=2)
    assert mxfp4_reason(team, Problem(8, 64, 1024, rows=8)) is None
    assert "32 columns" in mxfp4_reason(dataclasses.replace(team, folded=False), Problem(24, 64, 1024, rows=24))
    assert "by turns: stages" in mxfp4_reason(team, Problem(8, 64, 512, rows=8))
    assert "by turns: stages" in mxfp4_reason(dataclasses.replace(team, blocks=2), Problem(8, 64, 1024, rows=8))
    for wrong in ({"blocks": 3}, {"warpgroups": 5}, {"warpgroups": 3, "shares": 2}):
        with pytest.raises(ValueError, match="Mxfp4Rows"):
            Mxfp4Rows(**wrong)


def test_benchmarks():
    case = mxfp4.bench(GroupedCase("small", 3, 128, 512, (8,), 2, experts=4, hit=3))
    assert case.ours.keys() == case.choices.keys() and case.usual in case.ours
    assert {choice.kind for choice in case.choices.values()} == {"mxfp4"}
    assert case.nbytes == 3 * (2 * 128 * 512 * 17 // 32 + 3 * (512 + 2 * 128))
    layer = expert_layer.bench(LayerCase("small", 3, 512, 512, 4, 2, mxfp4=True))
    sets = layer.sets(1)[0]
    assert all(w.format == MXFP4 and w.validate() == [] for w in sets[1]) and "rows=8" in layer.usual
    # XLA's rounds gate and up to bfloat16, the benchmark's the hidden rows alone.
    assert disagreement(layer.xla["reference"](sets)[:2], layer.reference(sets), 3e-2, 2.0**-3) is None


@pytest.mark.parametrize(
    ("rows", "count", "tiling", "form"),
    [
        (8, 2, Mxfp4Rows(4, 2, 2, folded=False), FP8_GROUP),
        (16, 1, Mxfp4Rows(4, 4, 2, folded=False), jnp.bfloat16),
        (8, 1, Mxfp4Rows(4, 4, 2, shares=2, folded=False), jnp.bfloat16),
        (16, 1, Mxfp4Rows(2, 4, 2), FP8_GROUP),  # tables, a product ahead
        (24, 1, Mxfp4Rows(2, 4, 2), FP8_GROUP),  # three pieces of eight tokens for two consumers
        (112, 2, Mxfp4Rows(1, 4, 2), jnp.bfloat16),  # one by one
        (112, 1, Mxfp4Rows(1, 4, 2, parts=2), jnp.bfloat16),
    ],
)
def test_lowers_for_a_gpu(rows, count, tiling, form):
    """What the interpreter does not know: layouts, transfers, fragments, and that it all fits into shared memory."""
    total, n, k = 256, 2048, 4096
    m, shape = total * rows, jax.ShapeDtypeStruct
    pair = shape((total, n, k // 2), jnp.uint8), shape((total, n, k // 32), jnp.uint8)
    next_folded = tiling.folded if form == FP8_GROUP else None

    def run(x, x_scale, weights, expert, real, factors):
        return expert_rows(
            x, x_scale, weights, tiling, rows=rows, out_dtype=form, row_blocks=RowBlocks(expert, real),
            next_folded=next_folded, factors=factors, epilogue=gated if count == 2 else lambda sums, factors: sums,
        )  # fmt: skip

    x, x_scale = shape((m, k), jnp.float8_e4m3fn), shape(scales_shape(m, rows, k), jnp.int32)
    blocks = shape((total,), jnp.int32), shape((1,), jnp.int32), shape((m,), jnp.float32)
    jax.jit(run).trace(x, x_scale, [pair] * count, *blocks).lower(lowering_platforms=("cuda",))

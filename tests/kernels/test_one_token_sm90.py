"""The layer of one token in two launches, in the interpreter, against the reference on dequantised operands."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_matmul.tiling import FewRows
from pallas_kernels.formats import FP8_BLOCK, FP8_GROUP, MXFP4
from pallas_kernels.grouped_matmul import one_token_tiling
from pallas_kernels.grouped_matmul.one_token_layer_sm90 import experts
from pallas_kernels.grouped_matmul.one_token_tiling import Mxfp4Token, OneToken, TokenProduct, busiest, products, reason
from pallas_kernels.mosaic import interpreted
from pallas_kernels.router import Routing
from tests.kernels.compiled import dequantize, quantize, round_trip

E = 4
FLOAT_GROUP = dataclasses.replace(FP8_GROUP, scale="float32", power_of_two=False)
FLOAT_BLOCK = dataclasses.replace(FP8_BLOCK, scale="float32", power_of_two=False)


@functools.cache
def weights(form, d, i):
    rng = np.random.default_rng(0)
    shapes = ((E, i, d), (E, i, d), (E, d, i))
    return tuple(quantize(jnp.asarray(rng.normal(size=s) * s[-1] ** -0.5, jnp.float32), form) for s in shapes)


def routing_of(chosen, factors=None):
    chosen = np.asarray(chosen, np.int32)
    if factors is None:
        factors = np.random.default_rng(1).uniform(0.2, 1.5, chosen.shape)
    counts, order = np.bincount(chosen, minlength=E).astype(np.int32), np.argsort(chosen, kind="stable")
    arrays = (chosen[None], np.asarray(factors, np.float32)[None], np.zeros((1, E)), counts, order.astype(np.int32))
    return Routing(*map(jnp.asarray, arrays))


def exact(x, all_weights, routing, limit, form):
    """float64 [D]: hidden rows in bfloat16, rounded as between the two products."""
    row, total = np.asarray(round_trip(x.astype(jnp.float32), form), np.float64)[0], 0.0
    for expert, factor in zip(routing.experts[0].tolist(), routing.weights[0].tolist(), strict=True):
        w1, w3, w2 = (np.asarray(dequantize(w), np.float64)[expert] for w in all_weights)
        gate, up = np.minimum(w1 @ row, limit), np.clip(w3 @ row, -limit, limit)
        hidden = jnp.asarray(gate / (1 + np.exp(-gate)) * up * factor, jnp.bfloat16)
        total = total + w2 @ np.asarray(round_trip(hidden[None].astype(jnp.float32), form), np.float64)[0]
    return total


def token(d, seed=3):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(1, d)), jnp.bfloat16)


def run(x, all_weights, routing, tiling, form=FP8_GROUP):
    with interpreted():
        y = experts(x, *all_weights, routing, limit=2.0, tiling=tiling, activations=form)
        return np.asarray(y, np.float64)[0]


def check(got, want):
    rms = np.sqrt(np.mean(want**2))
    # A last bit of bfloat16 in a hidden row may choose another FP8 code; it does so in few of them.
    assert np.sqrt(np.mean((got - want) ** 2)) <= 1e-2 * rms
    assert np.median(np.abs(got - want)) <= 4e-3 * rms


@pytest.mark.parametrize(
    ("tiling", "d", "i", "chosen"),
    [
        (OneToken(FewRows(1, 2, 1), FewRows(1, 2, 1)), 256, 128, [2]),
        (OneToken(FewRows(2, 2, 2), FewRows(1, 3, 2, shares=2)), 256, 128, [3, 0]),
        (OneToken(FewRows(2, 2, 1, shares=2), FewRows(2, 2, 1, shares=3)), 512, 256, [1, 3, 0]),
        (OneToken(FewRows(1, 3, 2, shares=4), FewRows(2, 2, 4, 104, shares=2)), 512, 512, [1, 1]),
    ],
    ids=str,
)
def test_fp8(tiling, d, i, chosen):
    x, routing = token(d), routing_of(chosen)
    got = run(x, weights(FP8_BLOCK, d, i), routing, tiling)
    check(got, exact(x, weights(FP8_BLOCK, d, i), routing, 2.0, FP8_GROUP))


@pytest.mark.parametrize(
    ("tiling", "chosen"),
    [
        (OneToken(Mxfp4Token(4, 2), Mxfp4Token(4, 2, shares=2)), [3, 0]),
        (OneToken(Mxfp4Token(2, 3, teams=2), Mxfp4Token(1, 4)), [1]),
        (OneToken(Mxfp4Token(4, 2, turns=2), Mxfp4Token(4, 2, 2, 2, shares=2)), [2, 1, 2, 0]),
        (OneToken(Mxfp4Token(4, 2, shares=2), Mxfp4Token(2, 2, 1, shares=2)), [0, 3]),
    ],
    ids=str,
)
def test_mxfp4(tiling, chosen):
    x, routing, of_layer = token(1024), routing_of(chosen), weights(MXFP4, 1024, 512)
    check(run(x, of_layer, routing, tiling), exact(x, of_layer, routing, 2.0, FP8_GROUP))


@pytest.mark.parametrize(("form", "weight"), [(FLOAT_GROUP, FLOAT_BLOCK), (FLOAT_GROUP, MXFP4)], ids=["fp8", "mxfp4"])
def test_scales_of_float32(form, weight):
    tiling = one_token_tiling.default(512, 512, 2, mxfp4=weight == MXFP4)
    x, routing, of_layer = token(512), routing_of([2, 1]), weights(weight, 512, 512)
    check(run(x, of_layer, routing, tiling, form), exact(x, of_layer, routing, 2.0, form))


@pytest.mark.parametrize("form", [FP8_BLOCK, MXFP4], ids=["fp8", "mxfp4"])
def test_what_is_not_finite(form):
    """An infinity or NaN of the token is one of its result; NaN scales of experts that were not hit are not read."""
    tiling = one_token_tiling.default(512, 512, 2, mxfp4=form == MXFP4)
    w1, w3, w2 = weights(form, 512, 512)
    spoiled = dataclasses.replace(w1, scale=w1.scale.at[1].set(jnp.nan)), w3, w2
    x = token(512)
    assert np.isfinite(run(x, spoiled, routing_of([2, 3]), tiling)).all()
    assert np.isnan(run(x, spoiled, routing_of([2, 1]), tiling)).all()
    for value in (jnp.inf, jnp.nan):
        assert not np.isfinite(run(x.at[0, 77].set(value), (w1, w3, w2), routing_of([0, 3]), tiling)).any()


def test_zeros():
    """Of a token, and of routing weights: the smallest scales."""
    tiling = one_token_tiling.default(256, 128, 2, mxfp4=False)
    assert not run(token(256) * 0, weights(FP8_BLOCK, 256, 128), routing_of([0, 1]), tiling).any()
    assert not run(token(256), weights(FP8_BLOCK, 256, 128), routing_of([0, 1], [0.0, 0.0]), tiling).any()


@pytest.mark.parametrize("mxfp4", [False, True], ids=["fp8", "mxfp4"])
@pytest.mark.parametrize(("d", "i", "top"), [(4096, 2048, 6), (7168, 3072, 6), (512, 512, 1), (1024, 512, 8)], ids=str)
def test_default_tilings_fit_and_lower_for_a_gpu(d, i, top, mxfp4):
    """What the interpreter does not know: V4-Flash's, V4-Pro's, and small ones."""
    tiling, form = one_token_tiling.default(d, i, top, mxfp4=mxfp4), MXFP4 if mxfp4 else FP8_BLOCK
    for part, problem in products(d, i, top).items():
        assert reason(getattr(tiling, part), problem) is None

    def stored(*shape):
        return jax.eval_shape(lambda w: quantize(w, form), jax.ShapeDtypeStruct(shape, jnp.float32))

    def layer(x, w1, w3, w2, chosen, factors):
        counts, order = jnp.zeros(E, jnp.int32), jnp.zeros(top, jnp.int32)
        routing = Routing(chosen, factors, jnp.zeros((1, E)), counts, order)
        return experts(x, w1, w3, w2, routing, limit=10.0, tiling=tiling)

    arrays = (jax.ShapeDtypeStruct((1, *size), kind) for size, kind in
              (((d,), jnp.bfloat16), ((top,), jnp.int32), ((top,), jnp.float32)))  # fmt: skip
    x, chosen, factors = arrays
    of_up, of_down = stored(E, i, d), stored(E, d, i)
    jax.jit(layer).trace(x, of_up, of_up, of_down, chosen, factors).lower(lowering_platforms=("cuda",))


def test_defaults_spread_tiles_evenly():
    """V4-Flash's gate and up have a tile of 128 rows for most multiprocessors, V4-Pro's would have two for some."""
    for mxfp4 in (False, True):
        flash, pro = (one_token_tiling.default(*sizes, 6, mxfp4=mxfp4) for sizes in ((4096, 2048), (7168, 3072)))
        gates = [busiest(products(*sizes, 6)["gate_up"], 6) for sizes in ((4096, 2048), (7168, 3072))]
        assert gates[0](flash.gate_up) == 128 and gates[1](pro.gate_up) == 192 and gates[1](flash.gate_up) == 256


def test_what_does_not_fit():
    problem = TokenProduct(256, 1024, 1, 3)
    assert reason(FewRows(4, 2, 2, shares=3), problem) is None
    assert "multiples of [320, 128]" in reason(FewRows(1, 2, 5, 80), problem)
    assert "no multiple of 2048" in reason(FewRows(4, 2, 1, shares=4), problem)
    assert "3 blocks a stage" in reason(FewRows(3, 2, 1), TokenProduct(64, 384, 1, 1))
    assert "at most 8" in reason(FewRows(1, 2, 1, shares=12), problem)
    assert "shared memory" in reason(FewRows(4, 9, 1), problem)
    assert "multiples of [64, 512]" in reason(Mxfp4Token(2, 2), TokenProduct(64, 768, 1, 1))
    assert one_token_tiling.default(256, 96, 2, mxfp4=False) is None
    assert one_token_tiling.default(256, 128, 2, mxfp4=True) is None
    for wrong in ({"blocks": 3}, {"teams": 5}, {"turns": 2, "blocks": 2}, {"turns": 2, "stages": 3}):
        with pytest.raises(ValueError, match="Mxfp4Token"):
            Mxfp4Token(**wrong)

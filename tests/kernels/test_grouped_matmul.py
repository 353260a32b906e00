"""Expert matmuls: rows of each expert, however unevenly they fall, plain or quantised weights, both code paths."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.device import KINDS, pretend
from pallas_kernels.grouped_matmul import api, experts, scaled_dot
from pallas_kernels.grouped_matmul.reference import expert_gate_up, grouped_matmul
from pallas_kernels.quant import (
    FORMATS,
    FP8_BLOCK,
    FP8_GROUP,
    MXFP4,
    ObservedWeight,
    QuantTensor,
    TreatedWeight,
    observe,
)
from pallas_kernels.router import Routing
from tests.kernels.compiled import dequantize, quantize
from tests.kernels.sums import BOUNDS, ON_GPU

EXPERTS, OUT, IN = 6, 5, 32
multiply = jax.jit(grouped_matmul, static_argnums=3)
multiply_codes = jax.jit(scaled_dot.grouped_matmul, static_argnums=3)
layer = jax.jit(experts, static_argnames=("limit", "activations", "implementation"))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def definition(x, w, counts):
    expert = np.repeat(np.arange(len(counts)), counts)
    return np.stack([row.astype(np.float64) @ w[e].T.astype(np.float64) for row, e in zip(x, expert, strict=True)])


@pytest.mark.parametrize("rows", [1, EXPERTS, EXPERTS + 1], ids=lambda rows: f"{rows} rows")
def test_uneven_experts(rows):
    """All rows to one expert, the first, the last, or none to most; up to E rows the weights are gathered instead."""
    x, w = normal(0, rows, IN), normal(1, EXPERTS, OUT, IN)
    for split in ([0] * 6, [5] * 6, [2, 2, 4, 4, 4, 5], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 5]):
        counts = np.bincount(np.resize(np.sort(split), rows), minlength=EXPERTS).astype(np.int32)
        np.testing.assert_allclose(multiply(x, w, counts), definition(x, w, counts), rtol=1e-4, atol=1e-4)


def quantised(kind):
    """Random codes of one format, through the device as a checkpoint would bring them."""
    rng = np.random.default_rng(2)
    scales = rng.integers(125, 130, (EXPERTS, OUT if kind is MXFP4 else 1, 1), np.uint8).view(ml_dtypes.float8_e8m0fnu)
    if kind is MXFP4:
        codes = rng.integers(0, 256, (EXPERTS, OUT, IN // 2), np.uint8)
    else:
        codes = normal(3, EXPERTS, OUT, IN).astype(ml_dtypes.float8_e4m3fn)
    return QuantTensor(jax.device_put(codes), jax.device_put(scales), kind)


@pytest.mark.parametrize("kind", [FP8_BLOCK, MXFP4], ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows", [4, 20], ids=["few rows", "many rows"])
def test_quantised_weights_are_the_dequantised_ones(kind, rows):
    """Each path takes the codes AND the scales of the right expert."""
    x, w = normal(0, rows, IN), quantised(kind)
    counts = np.bincount([1, 1, 4, *[5] * (rows - 3)], minlength=EXPERTS).astype(np.int32)
    want = definition(x, np.asarray(dequantize(w)), counts)
    np.testing.assert_allclose(multiply(x, w, counts), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [4, 20], ids=["few rows", "many rows"])
def test_a_poisoned_row_stays_alone(rows):
    """NaN, as a token id out of range gives it, must not reach a batch mate, whether it has the same expert or not."""
    w, counts = normal(1, EXPERTS, OUT, IN), np.array([1, 2, 0, 0, 0, rows - 3], np.int32)
    clean = normal(0, rows, IN)
    poisoned = np.where(np.arange(rows)[:, None] == 1, np.float32(np.nan), clean)
    got, others = np.asarray(multiply(poisoned, w, counts)), np.arange(rows) != 1
    assert np.isnan(got[1]).all()
    np.testing.assert_array_equal(got[others], np.asarray(multiply(clean, w, counts))[others])


def routing_of(tokens, k):
    rng = np.random.default_rng(4)
    experts = np.stack([rng.permutation(EXPERTS)[:k] for _ in range(tokens)]).astype(np.int32)
    flat = experts.reshape(-1)
    order = np.argsort(flat, kind="stable").astype(np.int32)
    scores = np.zeros((tokens, EXPERTS), np.float32)
    counts = np.bincount(flat, minlength=EXPERTS).astype(np.int32)
    return Routing(*map(jnp.asarray, (experts, np.abs(normal(5, tokens, k)), scores, counts, order)))


@pytest.mark.parametrize(("tokens", "limit"), [(1, 0.8), (12, 0.8), (12, 0.0)])
def test_an_expert_layer(tokens, limit):
    """Token by token: sum over its experts of W2 (weight * silu(min(gate, limit)) * clip(up)); limit 0: no clamp."""
    k, hidden = 3, 7
    x, routing = normal(0, tokens, IN), routing_of(tokens, k)
    w1, w3, w2 = normal(1, EXPERTS, hidden, IN), normal(2, EXPERTS, hidden, IN), normal(3, EXPERTS, IN, hidden)
    want = np.zeros((tokens, IN))
    for token, slot in np.ndindex(tokens, k):
        e, weight = int(routing.experts[token, slot]), float(routing.weights[token, slot])
        gate, up = w1[e] @ x[token], w3[e] @ x[token]
        if limit:
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        want[token] += w2[e] @ (weight * gate / (1 + np.exp(-gate)) * up)
    got = layer(x, w1, w3, w2, routing, limit=limit)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("activations", [None, FORMATS["fp8_row"]])
def test_no_tokens(activations, batch_invariant):
    routing, empty = routing_of(1, 2), jnp.zeros((0, 2), jnp.int32)
    none = Routing(empty, empty.astype(jnp.float32), routing.scores[:0], 0 * routing.counts, empty[:, 0])
    w = [quantize(normal(seed, EXPERTS, IN, IN), FORMATS["fp8_row"]) for seed in range(3)]
    how = {"limit": 1.0, "activations": activations, "batch_invariant": batch_invariant}
    run = jax.jit(functools.partial(experts, **how, implementation="reference"))
    assert run(jnp.zeros((0, IN)), *w, none).shape == (0, IN)


def test_a_routing_of_other_tokens_is_named():
    x, routing, w = normal(0, 5, IN), routing_of(5, 2), normal(1, EXPERTS, IN, IN)
    odd = {"experts": (3, 2), "weights": (5, 3), "counts": (4,), "order": (9,)}
    for name, shape in odd.items():
        other = routing._replace(**{name: jnp.zeros(shape, getattr(routing, name).dtype)})
        with pytest.raises(ValueError, match=rf"routing.{name} has shape \({shape[0]},.*5 tokens, 2 choices"):
            experts(jnp.asarray(x), *[jnp.asarray(w)] * 3, other, limit=0.0)


@pytest.mark.parametrize("limit", [-1.0, float("nan")])
def test_a_clamp_below_zero_is_refused(limit):
    x, w = jnp.asarray(normal(0, 5, IN)), jnp.asarray(normal(1, EXPERTS, IN, IN))
    with pytest.raises(ValueError, match=f"limit is {limit}: of the SwiGLU clamp, 0 for none or a positive"):
        experts(x, w, w, w, routing_of(5, 2), limit=limit)


@pytest.mark.parametrize("form", ["fp8_row", "fp8_tensor", "int8_row", "int8_tensor"])
@pytest.mark.parametrize("rows", [4, 20], ids=["few rows", "many rows"])
def test_products_of_codes_are_the_reference(form, rows):
    """Experts and tokens of very different sizes, a row of zeros, and NaN that stays in its row."""
    sizes = np.exp(normal(5, EXPERTS, OUT, 1)) * np.arange(1, EXPERTS + 1, dtype=np.float32)[:, None, None]
    w, activations = quantize(normal(1, EXPERTS, OUT, IN) * sizes, FORMATS[form]), FORMATS[f"{form.split('_')[0]}_row"]
    x = normal(0, rows, IN) * np.exp(normal(6, rows, 1))
    x[0], x[2, 3] = 0, np.nan
    counts = np.bincount([1, 1, 4, *[5] * (rows - 3)], minlength=EXPERTS).astype(np.int32)
    got, want = (np.asarray(f(x, w, counts, activations)) for f in (multiply_codes, multiply))
    bound = BOUNDS[jnp.float32] if ON_GPU and form.startswith("fp8") else 1e-5
    np.testing.assert_allclose(got, want, rtol=bound, atol=bound * np.nanmax(np.abs(want)))
    assert np.isnan(got).any(axis=1).tolist() == [row == 2 for row in range(rows)] and not got[0].any()


@pytest.mark.parametrize("rows", [4, 20], ids=["few rows", "many rows"])
def test_treated_experts(rows):
    """A static scale, and channels in 16 bits that are multiplied apart."""
    w, channels = jnp.asarray(normal(1, EXPERTS, OUT, IN)), jnp.asarray([3, 17], jnp.int32)
    kept = quantize(w.at[..., channels].set(0), FORMATS["int8_row"])
    treated = TreatedWeight(kept, jnp.full((1, 1), 0.02), channels, w[..., channels].astype(jnp.bfloat16))
    x = normal(0, rows, IN)
    x[:, 3] *= 30
    counts = np.bincount([1, 1, 4, *[5] * (rows - 3)], minlength=EXPERTS).astype(np.int32)
    got, want = (np.asarray(f(x, treated, counts, FORMATS["int8_row"])) for f in (multiply_codes, multiply))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


REFUSALS = [
    (FORMATS["fp8_row"], FORMATS["fp8_row"], "H100 / H200", None),
    (FORMATS["fp8_row"], FORMATS["fp8_row"], "A100", "A100 has no FP8 matrix units"),
    (FORMATS["int8_row"], FORMATS["int8_row"], "A100", None),
    (MXFP4, FP8_GROUP, "H100 / H200", "XLA's dot takes no e2m1 codes packed two a byte"),
    (FP8_BLOCK, FORMATS["fp8_row"], "B200", "the scales of e4m3:128x128:ue8m0 weights vary along the contracted axis"),
    (None, FP8_GROUP, "B200", "the weight is not quantised"),
]


@pytest.mark.parametrize(("form", "activations", "device", "reason"), REFUSALS)
def test_refusals_say_what_is_missing(form, activations, device, reason):
    """Of each of the three products: their weights may be stored differently."""
    routing = routing_of(2, 2)
    x, plain = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, IN), (EXPERTS, 64, IN)))
    w = plain
    if form is not None:
        scale = jax.ShapeDtypeStruct(form.scale_shape(plain.shape), form.scale_dtype)
        w = QuantTensor(jax.ShapeDtypeStruct(form.values_shape(plain.shape), form.values_dtype), scale, form)
    refused = functools.partial(scaled_dot.unsupported_reason, x, limit=0.0, activations=activations)
    with pretend(KINDS[device]):
        assert refused(w, w, w, routing) == reason
        assert refused(plain, w, w, routing) == "the weight is not quantised"
        for weights in ((w, plain, w), (w, w, plain)):
            assert refused(*weights, routing) == (reason or "the weight is not quantised")


def test_an_expert_layer_on_a_device_with_the_units():
    """It takes the products of codes, with the reference's numbers."""
    x, routing, how = normal(0, 12, IN), routing_of(12, 3), {"activations": FORMATS["fp8_row"], "limit": 1.0}
    weights = [
        quantize(normal(seed, EXPERTS, *shape), FORMATS["fp8_row"])
        for seed, shape in enumerate(((8, IN), (8, IN), (IN, 8)))
    ]
    want = layer(x, *weights, routing, **how, implementation="reference")
    with pretend(KINDS["H100 / H200"]):
        candidate, refusals = api.EXPERTS.choose((x, *weights, routing), how)
        got = layer(x, *weights, routing, **how, implementation="scaled_dot")
    assert candidate.name == "scaled_dot" and refusals == (
        "sm90: weights are e4m3:row:float32: it takes e4m3 in 128 x 128 blocks, or MXFP4",
    )
    bound = 2e-2 if ON_GPU else 1e-3  # where hidden rows, of sums that are no float32's, become codes
    np.testing.assert_allclose(got, want, rtol=bound, atol=bound * np.abs(want).max())


@pytest.mark.parametrize("form", [None, FORMATS["fp8_row"]], ids=["plain", "quantised"])
def test_inputs_of_all_three_weights_are_shown(form):
    """The hidden rows too, which exist only within the layer: no implementation that hides them takes it."""
    x, routing = jnp.asarray(normal(0, 12, IN)), routing_of(12, 3)
    weights = [jnp.asarray(normal(seed, EXPERTS, *shape)) for seed, shape in enumerate(((8, IN), (8, IN), (IN, 8)))]
    if form is not None:
        weights = [quantize(w, form) for w in weights]
    watched = [ObservedWeight(w, name) for w, name in zip(weights, ("w1", "w3", "w2"), strict=True)]
    how = {"limit": 1.0, "activations": form}

    @jax.jit
    def run(x):
        with observe() as seen:
            return experts(x, *watched, routing, **how), dict(seen)

    with pretend(KINDS["H100 / H200"]):
        if form is not None:
            _, refusals = api.EXPERTS.choose((x, *weights[:2], watched[2], routing), how)
            assert refusals == ("sm90: the input of w2 is observed", "scaled_dot: the input of w2 is observed")
        got, seen = run(x)
    np.testing.assert_allclose(got, layer(x, *weights, routing, **how, implementation="reference"), rtol=1e-5)
    assert seen.keys() == {"w1", "w3", "w2"} and seen["w2"].shape == (36, 8)
    np.testing.assert_array_equal(seen["w1"], x)
    np.testing.assert_allclose(
        seen["w2"], jax.jit(expert_gate_up, static_argnames=("limit", "activations"))(x, *weights[:2], routing, **how)
    )

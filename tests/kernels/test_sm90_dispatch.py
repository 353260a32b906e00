"""The Hopper kernels as implementations of `block_matmul` and `experts`: what they refuse, take, and compute."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_matmul import api as dense_api
from pallas_kernels.block_matmul import matmul
from pallas_kernels.device import KINDS, pretend
from pallas_kernels.grouped_matmul import api as experts_api
from pallas_kernels.grouped_matmul import experts, sm90
from pallas_kernels.grouped_matmul import tilings as layer_tilings
from pallas_kernels.grouped_matmul.one_token_tiling import OneToken
from pallas_kernels.grouped_matmul.reference import expert_down, expert_gate_up
from pallas_kernels.mosaic import interpreted
from pallas_kernels.quant import FORMATS, FP8_BLOCK, FP8_GROUP, MXFP4, QuantTensor, TreatedWeight
from pallas_kernels.router import Routing
from tests.kernels import compiled, sums
from tests.kernels.compiled import quantize

H100 = KINDS["H100 / H200"]
FLOAT_BLOCK, FLOAT_GROUP = (dataclasses.replace(form, scale="float32") for form in (FP8_BLOCK, FP8_GROUP))
FLOAT_BLOCK, FLOAT_GROUP = (dataclasses.replace(form, power_of_two=False) for form in (FLOAT_BLOCK, FLOAT_GROUP))
shape = jax.ShapeDtypeStruct


def stored(form, *sizes):
    """A weight of these sizes by shapes alone; None for a plain one."""
    if form is None:
        return shape(sizes, jnp.bfloat16)
    values = shape(form.values_shape(sizes), form.values_dtype)
    return QuantTensor(values, shape(form.scale_shape(sizes), form.scale_dtype), form)


def treated(w, *, static=False, channels=0, rotated=False):
    scale = shape((1, 1), jnp.float32) if static else None
    kept = (shape((channels,), jnp.int32), shape((*w.shape[:-1], channels), jnp.bfloat16)) if channels else (None, None)
    return TreatedWeight(w, scale, *kept, rotated)


def abstract_routing(tokens, top, count):
    chosen = shape((tokens, top), jnp.int32), shape((tokens, top), jnp.float32), shape((tokens, count), jnp.float32)
    return Routing(*chosen, shape((count,), jnp.int32), shape((tokens * top,), jnp.int32))


def dense_choice(form=FP8_BLOCK, activations=FP8_GROUP, *, n=256, k=256, rows=(8,), w=None, out_dtype=None):
    """(what runs, what sm90 refused: None where it runs)."""
    how = {"activations": activations, "out_dtype": out_dtype}
    x = shape((*rows, k), jnp.bfloat16)
    candidate, refusals = dense_api.MATMUL.choose((x, w or stored(form, n, k)), how)
    return candidate.name, refusals[0].removeprefix("sm90: ") if refusals else None


def layer_choice(
    form=FP8_BLOCK, activations=FP8_GROUP, *, d=256, i=128, tokens=8, count=4, dtype=jnp.bfloat16, **other
):
    """As `dense_choice`. other: weights by name."""
    weights = {"w1": stored(form, count, i, d), "w3": stored(form, count, i, d), "w2": stored(form, count, d, i)}
    args = shape((tokens, d), dtype), *(weights | other).values(), abstract_routing(tokens, 2, count)
    candidate, refusals = experts_api.EXPERTS.choose(args, {"activations": activations, "limit": 1.0})
    return candidate.name, refusals[0].removeprefix("sm90: ") if refusals else None


ONE_TYPE = [
    ({"form": None}, "the weight is not quantised"),
    ({"activations": FLOAT_GROUP}, "scales of activations are float32, of weights ue8m0: it takes them of one type"),
    ({"form": FLOAT_BLOCK}, "scales of activations are ue8m0, of weights float32: it takes them of one type"),
]
OPERANDS = [  # of layers of experts; one product takes other formats too
    *ONE_TYPE,
    ({"activations": None}, "activations are not quantised"),
    ({"form": MXFP4, "i": 16384}, "K = 256 is no multiple of 512, and to fill up 8912896 bytes"),
    ({"form": MXFP4, "activations": None}, "activations are not quantised"),
    ({"form": MXFP4, "activations": FORMATS["fp8_row"]}, "activations are e4m3:row:float32: by MXFP4 it takes"),
    ({"form": FORMATS["int8_row"]}, "weights are int8:row:float32: it takes e4m3 in 128 x 128 blocks"),
    ({"form": FORMATS["fp8_row"]}, "weights are e4m3:row:float32: it takes e4m3 in 128 x 128 blocks"),
    ({"form": FORMATS["e5m2"]}, "weights are e5m2:128x128:ue8m0: it takes e4m3 in 128 x 128 blocks"),
    ({"activations": FORMATS["fp8_row"]}, "activations are e4m3:row:float32: it takes e4m3 in 1 x 128 groups"),
    ({"activations": FORMATS["e5m2_group"]}, "activations are e5m2:1x128:ue8m0: it takes e4m3 in 1 x 128 groups"),
]
CODES = "it takes e4m3 or e5m2, scales of"
BFLOAT16 = [dataclasses.replace(form, scale="bfloat16") for form in (FLOAT_BLOCK, FLOAT_GROUP)]
DENSE_OPERANDS = [
    *ONE_TYPE,
    ({"form": MXFP4}, f"weights are e2m1:1x32:ue8m0: {CODES} 128 x 128 blocks, rows or the whole"),
    (
        {"form": FORMATS["fp8_row"]},
        f"activations are e4m3:1x128:ue8m0: by e4m3:row:float32 {CODES} rows or the whole",
    ),
    (
        {"activations": FORMATS["fp8_row"]},
        f"activations are e4m3:row:float32: by e4m3:128x128:ue8m0 {CODES} 1 x 128 groups",
    ),
    (
        {"activations": FORMATS["int8_row"]},
        f"activations are int8:row:float32: by e4m3:128x128:ue8m0 {CODES} 1 x 128 groups",
    ),
    (dict(zip(("form", "activations"), BFLOAT16, strict=True)), "scales of blocks are bfloat16"),
]


@pytest.mark.parametrize("choice", [dense_choice, layer_choice])
def test_other_devices(choice):
    for name, device in KINDS.items():
        with pretend(device):
            ran, reason = choice()
        assert (ran == "sm90") == (device is H100), name
        assert reason == (None if device is H100 else f"{name} is no Hopper GPU (compute capability 9.0)")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        *DENSE_OPERANDS,
        ({"w": treated(stored(FP8_BLOCK, 256, 256), static=True)}, "the activation scale is static"),
        ({"k": 192, "n": 32768}, "K = 192 is no multiple of 128, and to fill up"),
        ({"n": 96}, "no tiling fits weights of 96 rows: a multiple of 64"),
        ({"out_dtype": jnp.float16}, "results in float16: it writes bfloat16 and float32"),
    ],
)
def test_what_dense_products_refuse(call, reason):
    with pretend(H100):
        ran, found = dense_choice(**call)
    assert ran != "sm90" and found is not None and found.startswith(reason)


UP, DOWN = stored(FP8_BLOCK, 4, 128, 256), stored(FP8_BLOCK, 4, 256, 128)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        *OPERANDS,
        ({"d": 512, "w3": stored(MXFP4, 4, 128, 512)}, "weights are fp4 and fp8: it takes them in one format"),
        ({"form": MXFP4, "d": 16384, "i": 256}, "K = 256 is no multiple of 512, and to fill up"),
        ({"w1": treated(stored(MXFP4, 4, 128, 512), static=True), "d": 512}, "the activation scale is static"),
        ({"w2": stored(None, 4, 256, 128)}, "the weight is not quantised"),
        (
            {"activations": dataclasses.replace(FP8_GROUP, rounding="stochastic")},
            "activations are rounded by stochastic: it rounds to nearest",
        ),
        ({"w1": treated(UP, static=True)}, "the activation scale is static"),
        ({"w3": treated(UP, channels=3)}, "channels of the input stay in 16 bits: it multiplies codes alone"),
        ({"w2": treated(DOWN, rotated=True)}, "the input is rotated before it is rounded"),
        ({"d": 192, "i": 8192}, "K = 192 is no multiple of 128, and to fill up"),
        ({"i": 192, "d": 8192}, "K = 192 is no multiple of 128, and to fill up"),
        ({"dtype": jnp.float16}, "tokens in float16: it takes bfloat16 and float32"),
        ({"tokens": 0}, "there are no tokens"),
    ],
)
def test_what_layers_of_experts_refuse(call, reason):
    with pretend(H100):
        ran, found = layer_choice(**call)
    assert ran != "sm90" and found is not None and found.startswith(reason)


@pytest.mark.parametrize(
    ("form", "activations"),
    [
        (FP8_BLOCK, dataclasses.replace(FP8_GROUP, floor=None)),
        (FLOAT_BLOCK, FLOAT_GROUP),
        (MXFP4, FP8_GROUP),
        (MXFP4, FLOAT_GROUP),
    ],
    ids=str,
)
def test_what_layers_of_experts_take(form, activations):
    with pretend(H100):
        assert layer_choice(form, activations, d=512, i=512) == ("sm90", None)


def test_a_weight_without_treatment_may_say_so():
    with pretend(H100):
        assert dense_choice(w=treated(stored(FP8_BLOCK, 256, 256))) == ("sm90", None)
        assert layer_choice(w1=treated(UP), w2=treated(DOWN)) == ("sm90", None)


def test_a_layer_that_no_tiling_fits(monkeypatch):
    monkeypatch.setattr(layer_tilings, "layer_tiling", lambda *_, **__: None)
    with pretend(H100):
        assert layer_choice() == ("reference", "no tiling fits experts [128, 256]")


@pytest.mark.parametrize("rows", [(1,), (8, 1), (1, 512)], ids=str)
def test_the_shipped_model(rows):
    """Width 256; experts and the shared one are half a block wide, and so filled up."""
    with pretend(H100):
        for n, k in ((512, 128), (128, 256), (64, 256), (256, 128), (256, 256), (256, 64)):
            assert dense_choice(n=n, k=k, rows=rows) == ("sm90", None), (n, k)
        for form in (FP8_BLOCK, MXFP4):
            assert layer_choice(form, d=256, i=64, count=8, tokens=int(np.prod(rows))) == ("sm90", None)


@pytest.mark.parametrize("tokens", [1, 8, 128, 512, 4096])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_v4_flash(tokens, dtype):
    """Dense layers and experts as released, and experts of the Base checkpoints, which are FP8."""
    sizes = {"d": 4096, "i": 2048, "count": 256, "tokens": tokens, "dtype": dtype}
    with pretend(H100):
        for n, k in ((1024, 4096), (32768, 1024), (512, 4096), (4096, 8192), (2048, 4096), (4096, 2048)):
            assert dense_choice(n=n, k=k, rows=(tokens,), out_dtype=dtype) == ("sm90", None), (n, k)
        assert layer_choice(**sizes) == ("sm90", None)
        assert layer_choice(MXFP4, **sizes) == ("sm90", None)


def test_rows_of_a_block_follow_those_of_an_expert():
    """Blocks of a whole tile for many rows; and for float32, which has no table of its own."""
    for mxfp4 in (False, True):
        find = functools.partial(sm90.layer_tiling, top=6, experts=256, d=4096, i=2048, dtype=jnp.bfloat16, mxfp4=mxfp4)
        rows = [find(tokens).rows for tokens in (2, 128, 1024, 16384)]
        assert rows == sorted(rows) and rows[0] <= 16 and rows[-1] >= 64
        assert isinstance(find(1), OneToken) and find(1, batch_invariant=True).rows == rows[0]
    assert sm90.layer_tiling(1, 6, 256, 4096, 2048, jnp.float32).rows == 128


@pytest.mark.parametrize("tokens", [1, 128, 4096])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("form", [FP8_BLOCK, MXFP4], ids=["fp8", "mxfp4"])
def test_a_layer_lowers_for_a_gpu(tokens, dtype, form):
    """What the interpreter does not know: that the tilings it is given fit into shared memory."""
    d, i, count = 4096, 2048, 256
    up, down = stored(form, count, i, d), stored(form, count, d, i)
    run = jax.jit(functools.partial(experts, limit=10.0, activations=FP8_GROUP, implementation="sm90"))
    with pretend(H100):
        traced = run.trace(shape((tokens, d), dtype), up, up, down, abstract_routing(tokens, 6, count))
    traced.lower(lowering_platforms=("cuda",))


def normal(seed, *sizes, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=sizes), dtype)


BOUNDS = sums.BOUNDS | {jnp.bfloat16: 2.0**-7}  # both results are rounded


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("rows", [(1,), (5,), (130,), (2, 3)], ids=str)
@pytest.mark.parametrize("kept", [False, True], ids=["", "channels kept"])
def test_dense_products_are_the_reference(rows, dtype, kept):
    n, k = 192, 256
    x, w = normal(0, *rows, k, dtype=dtype), normal(1, n, k)
    weight = quantize(w, FP8_BLOCK)
    if kept:
        channels = jnp.asarray([3, 17], jnp.int32)
        x = x.at[..., 3].multiply(30)
        weight = quantize(w.at[:, channels].set(0), FP8_BLOCK)
        weight = TreatedWeight(weight, None, channels, w[:, channels].astype(jnp.bfloat16))
    with interpreted():
        got = compiled.matmul(x, weight, activations=FP8_GROUP, implementation="sm90")
        got.block_until_ready()
    want = compiled.matmul(x, weight, activations=FP8_GROUP, implementation="reference")
    assert got.dtype == want.dtype == dtype
    sums.check(got, want, bound=BOUNDS[dtype])


@pytest.mark.parametrize(
    ("dtype", "out_dtype"), [(jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)], ids=["widened", "narrowed"]
)
def test_results_of_another_type_and_float32_scales(dtype, out_dtype):
    x, w = normal(0, 5, 256, dtype=dtype), quantize(normal(1, 64, 256), FLOAT_BLOCK)
    with interpreted():
        got = matmul(x, w, activations=FLOAT_GROUP, out_dtype=out_dtype, implementation="sm90")
        got.block_until_ready()
    # In float32: scales that are no powers of two are no bfloat16 numbers, to which a reference in it would round.
    want = matmul(x.astype(jnp.float32), w, activations=FLOAT_GROUP, implementation="reference")
    assert got.dtype == out_dtype
    sums.check(got, want, bound=BOUNDS[out_dtype])


@pytest.mark.parametrize(
    ("tokens", "dtype", "form", "activations"),
    [
        *((tokens, dtype, FP8_BLOCK, FP8_GROUP) for tokens in (1, 5, 130) for dtype in BOUNDS),
        (5, jnp.float32, FLOAT_BLOCK, FLOAT_GROUP),
    ],
)
def test_layers_of_experts_are_the_reference(tokens, dtype, form, activations):
    count, d, i, top = 4, 256, 128, 2
    rng = np.random.default_rng(tokens)
    chosen = np.stack([rng.permutation(count - 1)[:top] for _ in range(tokens)]).astype(np.int32)
    flat = chosen.reshape(-1)  # the last expert gets no token
    counts, order = np.bincount(flat, minlength=count).astype(np.int32), np.argsort(flat, kind="stable")
    factors = rng.uniform(0.2, 1.5, chosen.shape).astype(np.float32)
    scores = np.zeros((tokens, count), np.float32)
    routing = Routing(*map(jnp.asarray, (chosen, factors, scores, counts, order.astype(np.int32))))
    weights = [
        quantize(normal(seed, count, *sizes) / np.sqrt(sizes[1]), form)
        for seed, sizes in enumerate(((i, d), (i, d), (d, i)))
    ]
    x = normal(9, tokens, d, dtype=dtype)
    run = functools.partial(compiled.experts, x, *weights, routing, limit=2.0, activations=activations)
    with interpreted():
        got = run(implementation="sm90")
        got.block_until_ready()
    # The reference rounds gate and up to x's dtype, kernels the hidden rows alone, as here.
    hidden = expert_gate_up(x.astype(jnp.float32), *weights[:2], routing, limit=2.0, activations=activations)
    exact = expert_down(hidden.astype(dtype).astype(jnp.float32), weights[2], routing, activations=activations)
    # A last bit of a hidden row may choose another FP8 code, of 3 bits; it does so in few of them.
    sums.check(got, exact, bound=2.0 ** (-3 if sums.ON_GPU else -5), relative=5e-3)
    want = run(implementation="reference")
    assert got.dtype == want.dtype == dtype
    bound, relative = (2.0**-2, 3e-2) if dtype == jnp.bfloat16 else (2.0 ** (-3 if sums.ON_GPU else -5), 5e-3)
    sums.check(got, want, bound=bound, relative=relative)

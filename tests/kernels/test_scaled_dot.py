"""Products of codes against the reference, which multiplies the dequantised operands; and what they refuse.

XLA's CPU dot takes 8-bit codes too, so the candidates run here; only `auto` leaves them to devices with the units.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import products
from pallas_kernels.block_matmul import block_dot, matmul, reference, scaled_dot
from pallas_kernels.device import KINDS, pretend
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.formats import FORMATS, FP8_BLOCK, FP8_GROUP, MXFP4, parse_format
from pallas_kernels.mosaic import interpreted
from pallas_kernels.quant import QuantTensor, TreatedWeight
from pallas_kernels.quant.hadamard import rotate_blocks
from tests.kernels.compiled import quantize
from tests.kernels.sums import ON_GPU

WEIGHTS = {"fp8": ["fp8_row", "fp8_tensor", "e5m2:row:float32"], "int8": ["int8_row", "int8_tensor"]}
PAIRS = [(kind, w) for kind, names in WEIGHTS.items() for w in names]
ROUNDING = 2e-3 if ON_GPU else 2e-6  # cuBLAS adds products of FP8 codes as the kernels do, in some 14 bits
H100, A100, CPU = KINDS["H100 / H200"], KINDS["A100"], KINDS["CPU"]


def normal(seed, *shape, spread=0.0):
    """Rows that differ in size by e^spread, so that a scale of the wrong row shows."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(spread * rng.normal(size=(*shape[:-1], 1)))
    return (rng.normal(size=shape) * sizes).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("activations", "out_dtype"))
def run(candidate, x, w, *, activations, out_dtype=None):
    return candidate.matmul(x, w, activations=activations, out_dtype=out_dtype)


def compare(candidate, x, w, activations, out_dtype=None):
    """float32 sums of the same products, in another order: equal but for rounding, NaN in the same places."""
    got = run(candidate, x, w, activations=activations, out_dtype=out_dtype)
    want = run(reference, x, w, activations=activations, out_dtype=out_dtype)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    got, want = np.nan_to_num(got), np.nan_to_num(want)
    scale = np.max(np.abs(want), axis=-1, keepdims=True)
    return float(np.max(np.abs(got - want) / np.where(scale == 0, 1, scale)))


@pytest.mark.parametrize(("kind", "weight"), PAIRS, ids=lambda name: name)
def test_one_dot_is_the_reference(kind, weight):
    """K = 53 is a multiple of nothing; leading axes, a single row, a row of zeros, a poisoned one."""
    w, activations = quantize(normal(1, 19, 53, spread=1.0), parse_format(weight)), FORMATS[f"{kind}_row"]
    x = normal(2, 2, 3, 53, spread=1.0)
    x[0, 1], x[1, 0, 7] = 0, np.nan
    assert compare(scaled_dot, x, w, activations) < ROUNDING
    assert compare(scaled_dot, x[0, 0], w, activations) < ROUNDING
    assert np.isnan(run(scaled_dot, x, w, activations=activations)).sum() == 19, "one poisoned row of six"


def test_results_come_in_the_dtype_asked_for():
    """bfloat16 inputs: the reference rounds what it dequantises to bfloat16, the codes stay as they are."""
    x, w = normal(1, 4, 64).astype(jnp.bfloat16), quantize(normal(2, 24, 64), FORMATS["fp8_row"])
    assert compare(scaled_dot, x, w, FORMATS["fp8_row"]) < 2**-6
    assert compare(scaled_dot, x, w, FORMATS["fp8_row"], jnp.float32) < 2**-7
    y = run(scaled_dot, x, w, activations=FORMATS["fp8_row"], out_dtype=jnp.float32)
    exact = run(reference, x.astype(np.float32), w, activations=FORMATS["fp8_row"], out_dtype=jnp.float32)
    assert np.linalg.norm(np.asarray(y) - exact) <= ROUNDING * np.linalg.norm(exact)


@pytest.mark.parametrize("implementation", ["block_dot", "sm90", "reference"])
def test_codes_that_are_known_are_not_made_again(implementation):
    """Those of another input would give that one's product, so they are read; in another format they are passed by."""
    x, other = (jnp.asarray(normal(seed, 3, 256), jnp.bfloat16) for seed in (1, 2))
    w, how = quantize(normal(3, 128, 256), FP8_BLOCK), {"activations": FP8_GROUP, "implementation": implementation}
    with interpreted() if implementation == "sm90" else pretend(H100):
        y, y_other = (matmul(z, w, **how) for z in (x, other))
        same = matmul(x, w, codes=quantize(x, FP8_GROUP), **how)
        known = matmul(x, w, codes=quantize(other, FP8_GROUP), **how)
        odd = matmul(x, w, codes=quantize(other, FORMATS["fp8_row"]), **how)
        jax.block_until_ready((y, y_other, same, known, odd))
    for got, want in ((same, y), (odd, y), (known, y if implementation == "reference" else y_other)):
        np.testing.assert_array_equal(got, want)


def treated(kind, *, static=None, outliers=False, rotate=False):
    """A weight [19, 64] under the treatments that recipes know, built as they build it."""
    w, channels, columns = jnp.asarray(normal(3, 19, 64)), None, None
    if outliers:
        channels = jnp.asarray([5, 40], jnp.int32)
        columns, w = w[:, channels].astype(jnp.bfloat16), w.at[:, channels].set(0)
    w = jax.jit(rotate_blocks)(w) if rotate else w
    scale = None if static is None else jnp.full((1, 1), static, jnp.float32)
    return TreatedWeight(quantize(w, FORMATS[f"{kind}_row"]), scale, channels, columns, rotate)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize(
    "treatment", [{"static": 0.01}, {"outliers": True, "rotate": True}], ids=["static scale", "outliers, rotated"]
)
def test_treated_weights(kind, treatment):
    """A static scale saturates what it cannot reach, and an INT8 code has no NaN: as in the reference."""
    x, w = normal(4, 5, 64, spread=1.0), treated(kind, **treatment)
    x[:, 5], x[1] = 50 * x[:, 5], 0
    x[2, 7] = np.nan
    with pretend(H100):
        assert scaled_dot.unsupported_reason(x, w, activations=FORMATS[f"{kind}_row"]) is None
    assert compare(scaled_dot, x, w, FORMATS[f"{kind}_row"]) < ROUNDING


BLOCKS = {
    "released": (FP8_BLOCK, FP8_GROUP),
    "e5m2 weights": (FORMATS["e5m2"], FP8_GROUP),
    "blocks of the input alone": (FORMATS["fp8_row"], FP8_GROUP),
    "blocks of the weight alone": (FP8_BLOCK, FORMATS["fp8_row"]),
    "int8": (parse_format("int8:1x64:float32"), parse_format("int8:1x64:float32")),
}


@pytest.mark.parametrize("formats", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("rows", [3, 40], ids=["one batched product", "block by block"])
def test_blocks_are_the_reference(formats, rows):
    """Three blocks of K and, of 128 x 128, a partial tile of O = 150, each of another size."""
    weight, activations = formats
    sizes = np.exp(np.random.default_rng(5).normal(size=(1, 6)))
    x = normal(6, rows, 384, spread=1.0) * np.repeat(sizes, 64, axis=1).astype(np.float32)
    x[0], x[1, 200] = 0, np.nan
    w = quantize(normal(7, 150, 384, spread=1.0), weight)
    with pretend(H100):
        assert block_dot.unsupported_reason(x, w, activations=activations) is None
    assert compare(block_dot, x, w, activations) < ROUNDING


def test_fewer_channels_than_a_block():
    """One partial tile of 128: the recorded checkpoints' weights are so small."""
    assert compare(block_dot, normal(1, 2, 72), quantize(normal(2, 40, 72), FP8_BLOCK), FP8_GROUP) < ROUNDING


def test_hidden_accumulators_are_forbidden():
    """At default precision XLA may sum FP8 products in fewer bits than float32 has."""
    x, w = normal(1, 2, 128), quantize(normal(2, 8, 128), FORMATS["fp8_row"])
    for candidate in (scaled_dot, block_dot):
        text = jax.jit(functools.partial(candidate.matmul, activations=FORMATS["fp8_row"])).lower(x, w).as_text()
        dots = [line for line in text.splitlines() if "dot_general" in line]
        assert len(dots) == 1 and "HIGHEST" in dots[0] and dots[0].count("f8E4M3FN") >= 2


ROW, TENSOR, INT8 = FORMATS["fp8_row"], FORMATS["fp8_tensor"], FORMATS["int8_row"]
GROUP_64 = parse_format("e4m3:1x64:ue8m0")
REFUSALS = [
    # candidate, device, weight format (None: plain), activations, K, reason
    (scaled_dot, H100, None, ROW, 128, "the weight is not quantised"),
    (scaled_dot, H100, ROW, None, 128, "activations are not quantised"),
    (scaled_dot, H100, MXFP4, ROW, 128, "XLA's dot takes no e2m1 codes packed two a byte"),
    (scaled_dot, H100, ROW, INT8, 128, "no matrix unit multiplies int8 by e4m3"),
    (scaled_dot, H100, FORMATS["e5m2"], FORMATS["e5m2_group"], 128, "cuBLAS multiplies no e5m2 by e5m2"),
    (scaled_dot, A100, ROW, ROW, 128, "A100 has no FP8 matrix units"),
    (scaled_dot, KINDS["TPU"], TENSOR, ROW, 128, "TPU has no FP8 matrix units"),
    (scaled_dot, CPU, INT8, INT8, 128, "CPU has no INT8 matrix units that XLA uses"),
    (scaled_dot, H100, FP8_BLOCK, ROW, 256, "the scales of e4m3:128x128:ue8m0 weights vary along the contracted axis"),
    (
        scaled_dot,
        H100,
        ROW,
        FP8_GROUP,
        256,
        "the scales of e4m3:1x128:ue8m0 activations vary along the contracted axis",
    ),
    (block_dot, A100, FP8_BLOCK, FP8_GROUP, 256, "A100 has no FP8 matrix units"),
    (block_dot, H100, FP8_BLOCK, GROUP_64, 256, "blocks of 64 and of 128 along the contracted axis do not line up"),
    (block_dot, H100, FP8_BLOCK, ROW, 192, "K = 192 is no multiple of the block of 128"),
]


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: f"{case[0].__name__.split('.')[-1]}: {case[-1]}")
def test_refusals_say_what_is_missing(case):
    candidate, device, form, activations, k, reason = case
    x = jax.ShapeDtypeStruct((2, k), jnp.float32)  # shapes are all that is looked at
    w = jax.ShapeDtypeStruct((8, k), jnp.float32) if form is None else shape_of(form, (8, k))
    with pretend(device):
        assert candidate.unsupported_reason(x, w, activations=activations) == reason


def shape_of(form, shape):
    values = jax.ShapeDtypeStruct(form.values_shape(shape), form.values_dtype)
    return QuantTensor(values, jax.ShapeDtypeStruct(form.scale_shape(shape), form.scale_dtype), form)


def test_auto_takes_the_units_where_there_are_some():
    """The op under a pretended device: the same numbers by another product; a named one raises where it cannot run."""
    x, w = normal(1, 2, 256), quantize(normal(2, 8, 256), FP8_BLOCK)
    on_cpu = jax.jit(functools.partial(matmul, activations=FP8_GROUP))(x, w)
    with pretend(H100):
        lowered = jax.jit(functools.partial(matmul, activations=FP8_GROUP)).lower(x, w)
    assert "f8E4M3FN>, tensor" in "".join(line for line in lowered.as_text().splitlines() if "dot_general" in line)
    np.testing.assert_allclose(lowered.compile()(x, w), on_cpu, rtol=1e-5, atol=1e-4)
    refused = pytest.raises(UnsupportedError, match="block_matmul cannot run: block_dot: .* has no FP8 matrix units")
    with pretend(CPU), refused:
        matmul(jnp.asarray(x), w, activations=FP8_GROUP, implementation="block_dot")
    # A single static scale fits any blocks of the weight.
    static = TreatedWeight(shape_of(FP8_BLOCK, (8, 256)), jax.ShapeDtypeStruct((1, 1), jnp.float32))
    with pretend(dataclasses.replace(H100, name="some GPU")):
        assert block_dot.unsupported_reason(x, static, activations=ROW) is None


@pytest.mark.parametrize("flags", ["", "--xla_foo", f"{products.NO_TRITON} --xla_gpu_enable_triton_gemm=true"])
def test_int8_products_of_xla_itself_are_refused(flags, monkeypatch):
    """Its sums are wrong on GPUs, those of cuBLAS are right."""
    w = quantize(jnp.ones((128, 128)), INT8)
    monkeypatch.setenv("XLA_FLAGS", flags)
    with pretend(H100):
        reason = products.operands_unsupported_reason(w, INT8)
        assert reason is not None and f"add {products.NO_TRITON} to XLA_FLAGS" in reason
        monkeypatch.setenv("XLA_FLAGS", f"{flags} {products.NO_TRITON}")
        assert products.operands_unsupported_reason(w, INT8) is None
    monkeypatch.setenv("XLA_FLAGS", flags)
    with pretend(KINDS["TPU"]):
        assert products.operands_unsupported_reason(w, INT8) is None

"""mHC on Hopper against the reference: float32 coefficients, bfloat16 streams, tokens that do not see each other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hyper_connection
from pallas_kernels.bench import hyper_connection as bench
from pallas_kernels.bench.case import disagreement
from pallas_kernels.device import KINDS, pretend
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.formats import FP8_GROUP
from pallas_kernels.hyper_connection import kernel_sm90, post_sm90, reference, sm90
from pallas_kernels.hyper_connection.cases import BENCH, HyperCase
from pallas_kernels.hyper_connection.coefficients_sm90 import Numbers, sinkhorn
from pallas_kernels.hyper_connection.reference import Mix
from pallas_kernels.hyper_connection.share_sm90 import cut, share
from pallas_kernels.hyper_connection.tiling import TILE, PreTiling, default_tiling
from pallas_kernels.mosaic import interpreted, interpreter
from tests.kernels.compiled import quantize

HOW = {"iterations": 20, "eps": 1e-6, "norm_eps": 1e-6}
HOPPER = KINDS["H100 / H200"]


def parameters(width, seed=0):
    rng = np.random.default_rng(seed)
    columns = 4 * width
    numbers = (
        rng.normal(size=(24, columns)) / columns**0.5,
        rng.normal(size=24),
        [0.5, 1.0, 1.5],
        rng.normal(size=width),
    )
    return tuple(jnp.asarray(x, jnp.float32) for x in numbers)


def streams_of(tokens, width, seed=1):
    """Tokens of sizes 2^-20 to 2^20."""
    rng = np.random.default_rng(seed)
    sizes = np.exp2(rng.integers(-20, 21, (tokens, 1, 1)))
    return jnp.asarray(rng.normal(size=(tokens, 4, width)) * sizes, jnp.bfloat16)


def run_pre(streams, *arguments, tiling=None, **how):
    with interpreted():
        return jax.block_until_ready(kernel_sm90.pre(streams, *arguments, **HOW | how, tiling=tiling))


def check(got, want):
    assert bench.difference(got, want) is None
    assert got[0].dtype == jnp.bfloat16 and got[1].comb.dtype == got[1].post.dtype == jnp.float32


@pytest.mark.parametrize(
    ("tokens", "width", "tiling"),
    [
        (1, 256, PreTiling(1, lag=8)),
        (66, 256, PreTiling(4, stages=2, held=2)),  # a tile and two tokens
        (3, 256, PreTiling(4, stages=3)),  # buffers that units do not fill
        (4, 512, PreTiling(2, stages=2)),
    ],
)
def test_pre(tokens, width, tiling):
    arguments, streams = parameters(width), streams_of(tokens, width)
    check(run_pre(streams, *arguments, tiling=tiling), reference.pre(streams, *arguments, **HOW))


@pytest.mark.parametrize("width", [256, 1024])
def test_rows_are_quantised_as_they_come_out(width):
    """Bit for bit what x becomes; in the same launch where streams are wide."""
    arguments, streams = parameters(width), streams_of(3, width)
    x, _, codes = run_pre(streams, *arguments, form=FP8_GROUP)
    np.testing.assert_array_equal(x, run_pre(streams, *arguments)[0])
    for ours, theirs in zip(jax.tree.leaves(codes), jax.tree.leaves(quantize(x, FP8_GROUP)), strict=True):
        np.testing.assert_array_equal(ours.view(jnp.uint8), theirs.view(jnp.uint8))


def test_gradients_pass_by_the_codes():
    arguments, streams = parameters(256), streams_of(3, 256)

    def total(streams, **how):
        x, codes, mix = hyper_connection.pre_quantize_rows(streams, *arguments, **HOW, **how)
        assert codes.shape == (3, 256)
        return jnp.sum(x.astype(jnp.float32)) + jnp.sum(mix.comb)

    with pretend(HOPPER), interpreted():
        got = jax.block_until_ready(jax.jit(jax.grad(functools.partial(total, implementation="sm90")))(streams))
    assert disagreement(got, jax.jit(jax.grad(total))(streams), 2e-2, 2e-2) is None
    odd = dataclasses.replace(FP8_GROUP, tile=(1, 64))
    with pretend(HOPPER):
        assert "is not e4m3:1x128" in sm90.pre_unsupported(streams, arguments[0], form=odd)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the simulated wgmma's, of infinities
def test_what_a_token_is_depends_on_no_other():
    """Bits: permuted tokens, fewer tokens and in another tiling; and neighbours that are NaN and infinite."""
    arguments, streams = parameters(256), streams_of(4, 256)
    order = np.random.default_rng(2).permutation(4)
    bad = jnp.where(jnp.arange(4)[:, None, None] == 1, jnp.bfloat16(np.nan), streams).at[2, 1, 7].set(jnp.inf)
    one, pair = PreTiling(1, lag=8), PreTiling(4)
    runs = (streams, pair), (streams[order], pair), (streams[:2], one), (bad, pair)
    whole, permuted, few, spoilt = (run_pre(x, *arguments, tiling=tiling) for x, tiling in runs)
    good = np.isfinite(np.asarray(bad, np.float32)).all((1, 2))
    for all_of, moved, first, beside in zip(*map(jax.tree.leaves, (whole, permuted, few, spoilt)), strict=True):
        all_of, beside = np.asarray(all_of, np.float32), np.asarray(beside, np.float32)
        np.testing.assert_array_equal(np.asarray(moved, np.float32), all_of[order])
        np.testing.assert_array_equal(np.asarray(first, np.float32), all_of[:2])
        np.testing.assert_array_equal(beside[good], all_of[good])
        assert np.isnan(beside[~good]).any(-1).all()


def test_fn_keeps_its_24_bits():
    """Columns that cancel but for what bfloat16 and TF32 both lose."""
    width = 256
    fn = np.zeros((24, 4 * width), np.float32)
    fn[:, 0], fn[:, 1] = 1 + 2.0**-20, -1
    streams = jnp.zeros((1, 4, width), jnp.bfloat16).at[0, 0, :2].set(1)
    tiling = PreTiling(4)
    run = kernel_sm90.first_launch(cut(1, width, tiling, 2), width, tiling)
    with interpreted():
        partial = np.asarray(run(streams.reshape(1, -1), jnp.asarray(fn)))
    np.testing.assert_array_equal(partial[0, 0, 0, :24], np.float32(2.0**-20))
    assert partial[0, 0, 0, 24] == 2


@pytest.mark.parametrize(("tokens", "width"), [(1, 4096), (130, 4096), (1000, 256), (700, 7168), (300, 8192)])
def test_every_token_is_finished_once_and_not_too_early(tokens, width):
    tiling = default_tiling(tokens, width, 132)
    of = cut(tokens, width, tiling, 132)
    assert of.blocks <= 132 and tiling.lag >= of.least_lag(tiling)
    seen = []
    for block in range(of.blocks):
        mine = share(of, jnp.int32(block))
        assert int(mine.rounds) <= of.most_rounds
        for i in range(int(mine.rounds)):
            seen.append(token := int(mine.token(jnp.int32(i))))
            begun = {int(mine.tile(jnp.int32(j))) for j in range(int(mine.tiles_begun(jnp.int32(i + 1))))}
            left = {int(mine.tile(jnp.int32(j))) for j in range(int(mine.tiles_finished(jnp.int32(i))))}
            assert token >= tokens or token // TILE in begun - left
    assert sorted(token for token in seen if token < tokens) == list(range(tokens))


@pytest.mark.parametrize(("iterations", "eps"), [(1, 1e-6), (3, 0.3), (20, 0.0)])
def test_sinkhorn(iterations, eps):
    """By itself, outside of a kernel: as the interpreter evaluates it, on a GPU too."""
    logits = np.random.default_rng(3).normal(size=(16, 5)).astype(np.float32) * 4
    with interpreter.interpreted():
        got = jnp.stack(sinkhorn(list(jnp.asarray(logits)), Numbers(iterations, eps, 0.0)), axis=-1)
    want = reference.sinkhorn(jnp.asarray(logits.T.reshape(5, 4, 4)), iterations, eps)
    np.testing.assert_allclose(got.reshape(5, 4, 4), want, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(("shape", "dtype"), [((2, 3), jnp.bfloat16), ((1,), jnp.float32)])
@pytest.mark.parametrize("width", [128, 1024])
def test_post(shape, dtype, width):
    rng = np.random.default_rng(4)
    streams = jnp.asarray(rng.normal(size=(*shape, 4, width)), jnp.bfloat16)
    out = jnp.asarray(rng.normal(size=(*shape, width)), dtype)
    mix = Mix(*(jnp.asarray(rng.normal(size=(*shape, *n)), jnp.float32) for n in ((4,), (4, 4))))
    with interpreted():
        got = jax.block_until_ready(post_sm90.post(streams, out, mix))
    assert got.dtype == jnp.bfloat16
    assert disagreement(got, reference.post(streams, out, mix)) is None


def test_through_the_api_with_gradients():
    arguments, streams = parameters(256), streams_of(2, 256).reshape(1, 2, 4, 256) / 64

    def total(implementation, streams, fn):
        x, mix = hyper_connection.pre(streams, fn, *arguments[1:], **HOW, implementation=implementation)
        new = hyper_connection.post(streams, x, mix, implementation=implementation)
        return jnp.sum(new.astype(jnp.float32) ** 2)

    def of(total):
        return jax.jit(jax.grad(total, argnums=(0, 1)))

    with pretend(HOPPER), interpreted():
        got = jax.block_until_ready(of(functools.partial(total, "sm90"))(streams, arguments[0]))
    for ours, theirs in zip(got, of(functools.partial(total, "reference"))(streams, arguments[0]), strict=True):
        assert disagreement(ours, theirs, 2e-2, 2e-2) is None


@pytest.mark.parametrize(
    ("shape", "dtype", "fn_dtype", "reason"),
    [
        ((2, 3, 256), jnp.bfloat16, jnp.float32, "there are 3 streams: it takes 4"),
        ((2, 4, 256), jnp.float32, jnp.float32, "streams are float32: it takes bfloat16"),
        ((2, 4, 256), jnp.bfloat16, jnp.bfloat16, "fn is bfloat16: it takes float32"),
        ((0, 4, 256), jnp.bfloat16, jnp.float32, "there are no tokens"),
        ((2, 4, 384), jnp.bfloat16, jnp.float32, "streams are 384 wide: a multiple of 256"),
        ((2, 4, 200), jnp.bfloat16, jnp.float32, "streams are 200 wide: a multiple of 128 up to 8192"),
        ((2, 4, 256), jnp.bfloat16, jnp.float32, None),
    ],
)
def test_refusals(shape, dtype, fn_dtype, reason):
    streams, fn = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((24, 4 * shape[-1]), fn_dtype)
    with pretend(HOPPER):
        assert sm90.pre_unsupported(streams, fn) == reason
    with pretend(KINDS["A100"]):
        assert sm90.pre_unsupported(streams, fn) == "A100 is no Hopper GPU (compute capability 9.0)"


def test_divisions_need_an_eps():
    streams, fn = streams_of(1, 256), parameters(256)[0]
    with pretend(HOPPER):
        assert sm90.pre_unsupported(streams, fn, **HOW) is None
        assert sm90.pre_unsupported(streams, fn, **HOW | {"eps": 0.0}) == "eps is 0.0: it takes 1e-09 and more"


def test_a_named_kernel_is_refused_elsewhere():
    with (
        pretend(KINDS["CPU"]),
        pytest.raises(UnsupportedError, match="hyper_connection_pre cannot run: sm90: CPU is no Hopper GPU"),
    ):
        hyper_connection.pre(streams_of(1, 256), *parameters(256), **HOW, implementation="sm90")


@pytest.mark.parametrize(
    "case", [BENCH[0], BENCH[3], BENCH[-1], HyperCase("odd", 150, 256)], ids=lambda case: case.name
)
def test_lowers_for_a_gpu(case):
    """What the interpreter does not know: layouts and transfers."""
    made = jax.eval_shape(functools.partial(bench.parameters, case), jax.eval_shape(lambda: jax.random.key(0)))
    streams = jax.ShapeDtypeStruct((case.m, 4, case.width), jnp.bfloat16)
    jax.jit(functools.partial(kernel_sm90.pre, **HOW)).trace(streams, *made).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(("tokens", "width", "words"), [(1, 4096, 128), (2, 256, 8), (128, 7168, 56), (129, 256, None)])
@pytest.mark.parametrize("form", [None, FP8_GROUP])
def test_few_tokens_hand_over_words_on_a_gpu(tokens, width, words, form):
    """Memory that is cleared before the launch, a row of 32 for each part and token; behind it no semaphores."""

    def total(streams, *made):
        return jnp.sum(sm90.pre(streams, *made, **HOW, form=form)[0].astype(jnp.float32))

    columns = {256: width, 1024: 4 * width}
    made = [tuple(columns.get(n, n) for n in x.shape) for x in parameters(256)]
    made = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in made]
    streams = jax.ShapeDtypeStruct((tokens, 4, width), jnp.bfloat16)
    for run in (total, jax.value_and_grad(total), jax.value_and_grad(jax.checkpoint(total))):
        with pretend(HOPPER):
            text = jax.jit(run).trace(streams, *made).lower(lowering_platforms=("cuda",)).as_text()
        launches = [line for line in text.splitlines() if "@mosaic_gpu" in line and "tensor<24x" in line]
        assert launches
        for launch in launches:
            types = launch.split(" : ")[-1]
            assert (f"tensor<{(words or 0) * tokens * 32}xi32>" in types) == (words is not None), types
            assert ("x32xf32>" in types) == (words is None), types


def test_a_benchmark_computes_what_it_says():
    case = bench.bench_pre(HyperCase("small", 2, 256))
    sets = case.sets(1)[0]
    want = case.reference(sets)
    with interpreted():
        got = jax.block_until_ready(kernel_sm90.pre(sets[0], *sets[1], **HOW))
    assert case.wrong(got, want) is None
    assert "comb: relative error" in (case.wrong((got[0], Mix(got[1].post, 2 * got[1].comb)), want) or "")
    assert len(list(bench.benches())) == 3 * len(BENCH) and case.ours and case.limit > 0

"""Routing on Hopper against the reference: the same choice, counts and order, ties and NaN included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench import router as bench
from pallas_kernels.bench.case import disagreement
from pallas_kernels.device import KINDS, pretend
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.mosaic import interpreted
from pallas_kernels.router import kernel_sm90, many_sm90, order_sm90, reference, router, sm90
from pallas_kernels.router.cases import BENCH, RouterCase
from pallas_kernels.router.tiling import FEW, MOST_TILES, Share, Tiles, share, tiles
from pallas_kernels.router.token_sm90 import Rules, scored
from pallas_kernels.router.warps_sm90 import comparators

HOPPER = KINDS["H100 / H200"]


def inputs(tokens, experts=128, columns=256, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(tokens, columns)), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=(experts, columns)) / columns**0.5, jnp.float32)
    return x, weight, jnp.asarray(rng.normal(size=experts) / 10, jnp.float32)


def run(*arguments, k=2, scoring="sqrtsoftplus", normalize=True, scale=1.5):
    kernel = kernel_sm90 if len(arguments[0]) <= FEW else many_sm90
    with interpreted():
        return jax.block_until_ready(kernel.router(*arguments, Rules(k, scoring, normalize, scale)))


def check(got, *arguments, k=2, scoring="sqrtsoftplus", normalize=True, scale=1.5):
    """Bit for bit, but for rounding in scores and weights."""
    want = reference.router(*arguments, k=k, scoring=scoring, normalize=normalize, scale=scale)
    for name in ("experts", "counts", "order"):
        ours, theirs = getattr(got, name), getattr(want, name)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    for name in ("scores", "weights"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("tokens", "experts", "columns", "k", "scoring", "normalize"),
    [
        (1, 128, 256, 6, "sqrtsoftplus", True),
        (9, 256, 256, 8, "sigmoid", True),
        (17, 128, 256, 1, "softmax", True),
        (3, 128, 384, 2, "sqrtsoftplus", False),
        (2, 8, 256, 8, "sigmoid", True),
        (129, 256, 256, 6, "sqrtsoftplus", True),
        (130, 384, 128, 8, "softmax", True),
        (131, 8, 192, 8, "sigmoid", False),
        (148, 128, 256, 1, "sqrtsoftplus", True),
    ],
)
def test_kernel(tokens, experts, columns, k, scoring, normalize):
    arguments = *inputs(tokens, experts, columns), None
    how = {"k": k, "scoring": scoring, "normalize": normalize}
    check(run(*arguments, **how), *arguments, **how)


def test_several_chunks_a_block(monkeypatch):
    monkeypatch.setattr(kernel_sm90, "share", lambda *_: Share(experts=32, parts=2, chunks=2))
    arguments = *inputs(2, 128, 512), None
    check(run(*arguments), *arguments)


def test_several_rounds_of_a_tile(monkeypatch):
    """The last one a part of one, and with tokens that only fill up."""
    monkeypatch.setattr(many_sm90, "tiles", lambda tokens: Tiles(2, 5))
    arguments = *inputs(137), None
    check(run(*arguments), *arguments)


@pytest.mark.parametrize("tokens", [2, 133])
def test_a_matrix_in_bfloat16_and_no_bias(tokens):
    x, weight, _ = inputs(tokens)
    arguments = x, weight.astype(jnp.bfloat16), None, None
    check(run(*arguments), *arguments)


@pytest.mark.parametrize("times", [1, 45])
def test_given_experts_even_twice_the_same(times):
    table = jnp.asarray([[5, 5], [127, 0], [5, 0]] * times, jnp.int32)
    arguments = *inputs(3 * times)[:2], None, table
    check(run(*arguments), *arguments)


@pytest.mark.parametrize("tokens", [70, 150])
def test_ties_go_to_the_lower_expert_and_all_to_the_same(tokens):
    x, weight, _ = inputs(tokens)
    bias = jnp.zeros(128).at[jnp.asarray([3, 64, 127])].set(1)
    arguments = x, 0 * weight, bias, None
    got = run(*arguments, k=4)
    check(got, *arguments, k=4)
    assert got.experts.tolist() == [[3, 64, 127, 0]] * tokens and got.counts[3] == tokens


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the simulated wgmma's, of infinities
@pytest.mark.parametrize("tokens", [4, 132])
def test_a_token_that_is_not_finite_spoils_no_other(tokens):
    """It gets experts that exist, and NaN for weights."""
    x, weight, bias = inputs(tokens)
    good = run(x, weight, bias, None)
    bad = x.at[1].set(jnp.nan).at[2, 5].set(jnp.inf)
    got = run(bad, weight, bias, None)
    for name in ("experts", "weights", "scores"):
        ours, theirs = np.asarray(getattr(got, name)), np.asarray(getattr(good, name))
        np.testing.assert_array_equal(np.delete(ours, (1, 2), 0), np.delete(theirs, (1, 2), 0))
    chosen = np.asarray(got.experts)
    assert chosen.min() >= 0 and chosen.max() < 128 and all(len(set(row)) == 2 for row in chosen.tolist())
    np.testing.assert_array_equal(got.counts, np.bincount(chosen.reshape(-1), minlength=128))
    np.testing.assert_array_equal(got.order, np.argsort(chosen.reshape(-1), kind="stable"))
    assert np.isnan(np.asarray(got.weights)[1]).all()


def test_experts_that_a_bias_of_minus_infinity_rules_out():
    """Behind those that it leaves, the lowest ones, and none twice."""
    x, weight, _ = inputs(2)
    bias = jnp.full(128, -jnp.inf).at[77].set(0)
    got = run(x, weight, bias, None, k=3)
    assert got.experts.tolist() == [[77, 0, 1]] * 2


@pytest.mark.parametrize("tokens", [3, 131])
@pytest.mark.parametrize("bias", [False, True])
def test_no_token_takes_an_expert_that_only_fills_up_for_an_infinity(tokens, bias):
    """Which makes NaN of zeros: those of experts that do not exist."""
    x, weight, some = inputs(tokens, experts=8)
    x = x.at[1, 5].set(jnp.inf).at[2].set(jnp.nan)
    with np.errstate(invalid="ignore"):
        got = run(x, weight, some if bias else None, None, k=6, scoring="sigmoid")
    chosen = np.asarray(got.experts)
    assert chosen.max() < 8 and all(len(set(row)) == 6 for row in chosen.tolist())
    np.testing.assert_array_equal(got.counts, np.bincount(chosen.reshape(-1), minlength=8))
    np.testing.assert_array_equal(got.order, np.argsort(chosen.reshape(-1), kind="stable"))


def test_given_experts_that_do_not_exist_are_taken_for_the_nearest():
    """Places in memory are made of them."""
    table = jnp.asarray([[-1, 3], [200, 5], [2, 2**31 - 1]], jnp.int32)
    x, weight, _ = inputs(3, experts=8)
    how = {"k": 2, "scoring": "sigmoid", "normalize": True, "scale": 1.0, "implementation": "sm90"}
    with pretend(HOPPER), interpreted():
        got = jax.block_until_ready(router(x, weight, None, table, **how))
    assert got.experts.tolist() == [[0, 3], [7, 5], [2, 7]] and got.counts.sum() == 6


@pytest.mark.parametrize("counts", [17, 33])
def test_rows_in_order_of_more_tiles_than_are_loaded_at_once(counts):
    rng = np.random.default_rng(0)
    experts = rng.integers(0, 128, (counts * 4 - 3, 2)).astype(np.int32)
    of_tiles = [np.bincount(experts[i : i + 4].reshape(-1), minlength=128) for i in range(0, len(experts), 4)]
    with interpreted():
        order, total = jax.block_until_ready(
            order_sm90.order(jnp.asarray(experts), jnp.asarray(of_tiles, jnp.int32), 8)
        )
    np.testing.assert_array_equal(order, np.argsort(experts.reshape(-1), kind="stable"))
    np.testing.assert_array_equal(total, np.bincount(experts.reshape(-1), minlength=128))


def test_no_token_takes_an_expert_that_only_fills_up():
    """Not even where a bias of minus infinity is on all that there are; and one of NaN is the best."""
    x, weight, _ = inputs(2, experts=8)
    got = run(x, weight, jnp.full(8, -jnp.inf), None, k=8)
    assert got.experts.tolist() == [list(range(8))] * 2 and got.counts.tolist() == [2] * 8
    assert run(x, weight, jnp.zeros(8).at[5].set(-jnp.nan), None, k=1).experts.tolist() == [[5]] * 2


@pytest.mark.parametrize("tokens", [6, 140])
def test_permuted_tokens_give_permuted_bits(tokens):
    x, weight, bias = inputs(tokens)
    order = np.random.default_rng(1).permutation(tokens)
    whole, permuted = run(x, weight, bias, None), run(x[order], weight, bias, None)
    for name in ("experts", "weights", "scores"):
        np.testing.assert_array_equal(getattr(permuted, name), np.asarray(getattr(whole, name))[order])


def test_scores_keep_their_digits_where_softplus_is_small():
    logits = jnp.asarray([-200.0, -100, -80, -30, -17, -16, -5, -1e-3, 0, 1e-3, 5, 30, 200, np.nan])
    for scoring in ("sqrtsoftplus", "sigmoid"):
        want = reference._score(logits, scoring)
        np.testing.assert_allclose(scored(logits, scoring), want, rtol=2e-6)


@pytest.mark.parametrize("tokens", [2, 132])
def test_through_the_api_with_gradients(tokens):
    x, weight, bias = inputs(tokens)

    def total(implementation, x, weight, bias):
        got = router(
            x, weight, bias, None,
            k=2, scoring="sqrtsoftplus", normalize=True, scale=1.5, implementation=implementation,
        )  # fmt: skip
        return jnp.sum(got.weights * jnp.array([[1.0, 2.0]])) + jnp.sum(got.scores**2)

    def of(total):
        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))

    with pretend(HOPPER), interpreted():
        got = jax.block_until_ready(of(functools.partial(total, "sm90"))(x, weight, bias))
    for ours, theirs in zip(got, of(functools.partial(total, "reference"))(x, weight, bias), strict=True):
        assert disagreement(ours, theirs) is None
    assert not got[2].any(), "a bias decides which experts, not how much of them"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"x": jnp.float32}, "x is float32: it takes bfloat16, which products with bfloat16 terms keep exact"),
        ({"tokens": 129}, None),
        ({"tokens": 0}, "there are no tokens: it takes one and more"),
        ({"experts": 5}, "there are 5 experts: it takes at least the 6 that a token takes, up to 512"),
        ({"experts": 513}, "there are 513 experts: it takes at least the 6 that a token takes, up to 512"),
        (
            {"experts": 8},
            "softmax over 8 experts: it takes multiples of 128, for others are filled up to one",
        ),
        ({"experts": 8, "scoring": "sigmoid"}, None),
        (
            {"columns": 200},
            "a matrix of (256, 200): it takes multiples of 64 columns",
        ),
        ({"k": 9}, "a token takes 9 experts: it takes 1 to 8"),
        ({"scoring": "relu"}, "scoring is 'relu': it takes sqrtsoftplus, sigmoid, softmax"),
        ({}, None),
    ],
)
def test_refusals(changed, reason):
    call = {"x": jnp.bfloat16, "tokens": 3, "experts": 256, "columns": 4096, "k": 6, "scoring": "softmax"} | changed
    x = jax.ShapeDtypeStruct((call["tokens"], call["columns"]), call["x"])
    weight = jax.ShapeDtypeStruct((call["experts"], call["columns"]), jnp.float32)
    how = {"k": call["k"], "scoring": call["scoring"], "normalize": True, "scale": 1.0}
    with pretend(HOPPER):
        assert sm90.unsupported_reason(x, weight, None, None, **how) == reason


def test_a_named_kernel_is_refused_elsewhere():
    with pretend(KINDS["CPU"]), pytest.raises(UnsupportedError, match="router cannot run: sm90: CPU is no Hopper GPU"):
        router(
            *inputs(1), None,
            k=2, scoring="sigmoid", normalize=True, scale=1.0, implementation="sm90",
        )  # fmt: skip


def test_the_choice_sorts():
    """Whatever is in two kinds of values; then it sorts all."""
    for count in (4, 8, 12, 16):
        values = [(np.arange(2**count) >> i) & 1 for i in range(count)]
        for low, high in comparators(count):
            values[low], values[high] = np.maximum(values[low], values[high]), np.minimum(values[low], values[high])
        assert all((a >= b).all() for a, b in zip(values, values[1:], strict=False))


def test_terms_add_up():
    """To every bit, the smallest numbers' too."""
    weight = jnp.asarray(np.random.default_rng(0).normal(size=1000) * 2.0 ** np.arange(-100, 100, 0.2), jnp.float32)
    terms = many_sm90.terms_of(weight)
    assert all(term.dtype == jnp.bfloat16 for term in terms)
    np.testing.assert_array_equal(sum(np.asarray(term, np.float64) for term in terms), np.asarray(weight, np.float64))


def test_every_token_is_in_a_tile():
    for tokens in (129, 130, 500, 2112, 2113, 4096, 65537):
        cut = tiles(tokens)
        assert cut.count <= MOST_TILES and (cut.count - 1) * cut.tokens < tokens <= cut.count * cut.tokens


def test_every_thread_block_runs_at_once():
    for experts in (128, 256, 384, 512):
        for columns in (1024, 4096, 7168):
            for multiprocessors in (132, 114):
                for tokens in (1, 128):
                    found = share(tokens, experts, columns, multiprocessors)
                    assert experts // found.experts * found.parts <= multiprocessors
                    assert columns % (found.parts * found.chunks) == 0


@pytest.mark.parametrize(
    "case",
    [
        *(BENCH[0], BENCH[-1], RouterCase("odd", 100), RouterCase("many", 4095)),
        *(RouterCase("fills up", 3, 8, 256), RouterCase("many, fills up", 150, 8, 256)),
    ],
    ids=lambda case: case.name,
)
def test_lowers_for_a_gpu(case):
    """What the interpreter does not know: layouts, transfers, and the three steps in one launch."""
    sets = jax.eval_shape(functools.partial(bench.inputs, case), jax.eval_shape(lambda: jax.random.key(0)))
    bench.run.trace(case.k, sets).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(("tokens", "cleared_before"), [(1, True), (2, True), (128, False)])
def test_gradients_lower_for_a_gpu(tokens, cleared_before):
    """Words of few tokens are written in place, which jax would differentiate if it saw it; of many, none are given."""
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(tokens, 256, 4096)]

    def total(x, weight, bias):
        got = router(
            x, weight, bias, None, k=2, scoring="sigmoid", normalize=True, scale=1.5, implementation="sm90"
        )  # fmt: skip
        return jnp.sum(got.weights)

    with pretend(HOPPER):
        lowered = jax.jit(jax.grad(total, argnums=(0, 1))).trace(*arrays).lower(lowering_platforms=("cuda",))
    launches = [line for line in lowered.as_text().splitlines() if "@mosaic_gpu" in line]
    assert len(launches) == 1 + cleared_before


def test_a_benchmark_computes_what_it_says():
    case = bench.bench(RouterCase("small", 3, 128, 256, 2))
    sets = case.sets(1)[0]
    want = case.reference(sets)
    with interpreted():
        got = jax.block_until_ready(kernel_sm90.router(*sets, None, Rules(2, "sqrtsoftplus", True, bench.SCALE)))
    assert case.wrong(got, want) is None
    assert case.wrong(got._replace(order=got.order[::-1]), want) == "rows are out of order"
    assert case.wrong(got._replace(counts=got.counts[::-1]), want) == "counts are not those of the experts"
    assert len(list(bench.benches())) == len(BENCH) and case.ours and case.limit > 0

"""The Hopper kernel of indexer scores, in the interpreter: the definition on the dequantised keys."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench import index_scores as bench
from pallas_kernels.device import KINDS, pretend
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.index_scores import index_scores, schedule, sm90
from pallas_kernels.index_scores.cases import ScoreCase
from pallas_kernels.index_scores.sm90 import MOST_HEADS
from pallas_kernels.index_scores.tiling import FP4_STAGES, MOST_STAGES, default_tiling
from pallas_kernels.mosaic import interpreted
from pallas_kernels.quant import Pages, Rows, as_cached, paged
from pallas_kernels.row_format import entry_format, index_format
from tests.kernels.compiled import decode_rows, encode_rows, quantize
from tests.kernels.sums import ON_GPU

FP8 = index_format("fp8")
HEADS, WIDTH = 8, 64
NAN_CODE = 0x7F


def operands(batch, tokens, entries, heads=HEADS, width=WIDTH, seed=0):
    """Queries and keys as Rows, whose scales go from 2^-20 to 2^12, and weights of both signs."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(batch, tokens, heads, width)) * np.exp2(rng.integers(-3, 4, (batch, tokens, heads, 1)))
    keys = rng.normal(size=(batch, entries, width)) * np.exp2(rng.integers(-12, 20, (batch, entries, 1)))
    q, keys = (encode_rows(jnp.asarray(x, jnp.float32), FP8) for x in (q, keys))
    return q, keys, jnp.asarray(rng.normal(size=(batch, tokens, heads)), jnp.float32)


def test_gradients_are_those_of_the_reference():
    q, keys, weights = operands(1, 2, 40)

    def loss(weights, implementation):
        return jnp.sum(jnp.tanh(index_scores(q, keys, weights, implementation=implementation)))

    with interpreted():
        got = jax.block_until_ready(jax.grad(loss)(weights, "sm90"))
    want = jax.grad(loss)(weights, "reference")
    assert jnp.any(want != 0)
    np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-2 * float(jnp.max(jnp.abs(want))))


def table_of(batch, entries, page, seed=0):
    each = -(-entries // page)
    return jnp.asarray(np.random.default_rng(seed).permutation(batch * each).reshape(batch, each).astype(np.int32))


def run_kernel(*args):
    with interpreted():
        return np.asarray(jax.block_until_ready(index_scores(*args, implementation="sm90")))


def expected(q, keys, weights):
    q, keys = (np.asarray(decode_rows(x, jnp.float32), np.float64) for x in (q, keys))
    products = np.maximum(np.einsum("bthk,bck->bthc", q, keys), 0)
    weights = np.asarray(weights, np.float64)[..., None]
    size = np.einsum("bthk,bck->bthc", np.abs(q), np.abs(keys)) if ON_GPU else products
    return (products * weights).sum(axis=2), np.abs(size * weights).sum(axis=2)


def assert_scored(got, q, keys, weights, counts):
    """Float32 sums of at most 128 x heads exact products: an error of one part in 10^5 of what was added.

    On a GPU products of codes are added in 14 bits: one part in 2^11 of what was added there.
    """
    want, size = expected(q, keys, weights)
    entries = keys.shape[1]
    assert got.dtype == np.float32 and got.shape[:2] == want.shape[:2] and got.shape[2] >= entries
    wanted = np.arange(entries) < np.asarray(counts)[..., None]
    assert np.isfinite(got[..., :entries][wanted]).all()
    with np.errstate(invalid="ignore"):  # of what is not wanted, which may be anything
        error = np.abs(got[..., :entries] - want) / np.maximum(size, 1e-30)
    assert np.max(error, where=wanted, initial=0) < (2.0**-11 if ON_GPU else 1e-5)


def hide(pages: Pages, counts) -> Pages:
    """NaN in every page that is not wanted, and numbers that are no pages where the table names them."""
    pool, table = np.array(pages.pool), np.array(pages.table)
    most = np.asarray(counts).max(axis=1)
    for line, count in zip(table, most, strict=True):
        unread = slice(-(-int(count) // pages.page_size), None)
        pool[line[unread]] = NAN_CODE
        line[unread] = np.resize([2**30, -1], len(line[unread]))
    return dataclasses.replace(pages, pool=jnp.asarray(pool), table=jnp.asarray(table))


@pytest.mark.parametrize(("page", "entries"), [(32, 100), (64, 300), (256, 300)])
def test_pages(page, entries):
    """Counts around a page and an item, pages shuffled, NaN and nonsense behind the wanted ones."""
    counts = jnp.array([[0], [1], [page - 1], [page], [page + 1], [entries]], jnp.int32)
    q, keys, weights = operands(len(counts), 1, entries)
    pages = hide(paged(keys, page, table_of(len(counts), entries, page)), counts)
    assert_scored(run_kernel(q, pages, weights, counts), q, keys, weights, counts)


@pytest.mark.parametrize(
    ("batch", "tokens", "entries", "heads", "width"),
    [(1, 1, 600, 64, 128), (2, 3, 256, 8, 64), (1, 8, 130, 4, 32), (35, 1, 128, 8, 32)],
)
def test_rows(batch, tokens, entries, heads, width):
    """One token and several, whose counts differ; entries that are no multiple of an item, nor heads of eight; more
    units than lanes."""
    q, keys, weights = operands(batch, tokens, entries, heads, width)
    counts = np.random.default_rng(1).integers(0, entries + 9, (batch, tokens)).astype(np.int32)
    assert_scored(run_kernel(q, keys, weights, jnp.asarray(counts)), q, keys, weights, counts)


def test_a_pool_without_a_table():
    """Every sequence sees every page."""
    q, keys, weights = operands(2, 1, 192)
    pages = dataclasses.replace(paged(keys, 64), table=None)
    shared = jax.tree.map(lambda leaf: jnp.tile(leaf.reshape(1, -1, leaf.shape[-1]), (2, 1, 1)), keys)
    counts = jnp.array([[384], [70]], jnp.int32)
    assert_scored(run_kernel(q, pages, weights, counts), q, shared, weights, counts)


def test_many_units_are_dealt_whole(monkeypatch):
    monkeypatch.setattr(schedule, "MOST_SPLIT", 3)
    q, keys, weights = operands(5, 1, 256)
    counts = jnp.array([[256], [0], [129], [1], [200]], jnp.int32)
    assert_scored(run_kernel(q, keys, weights, counts), q, keys, weights, counts)


def test_a_sequence_does_not_depend_on_the_others():
    """Permuted sequences give permuted bits, and one alone the same."""
    q, keys, weights = operands(4, 1, 256)
    counts = jnp.array([[256], [100], [33], [190]], jnp.int32)
    order = np.array([2, 0, 3, 1])
    whole = run_kernel(q, keys, weights, counts)
    permuted = run_kernel(*jax.tree.map(lambda leaf: leaf[order], (q, keys, weights, counts)))
    alone = run_kernel(*jax.tree.map(lambda leaf: leaf[1:2], (q, keys, weights, counts)))
    for at, b in enumerate(order):
        np.testing.assert_array_equal(permuted[at, 0, : counts[b, 0]], whole[b, 0, : counts[b, 0]])
    np.testing.assert_array_equal(alone[0, 0, :100], whole[1, 0, :100])


def test_queries_on_the_grid_are_quantised_exactly():
    """Of values that a cache gave back the scale may halve, where the largest rounded down to half of 448."""
    dtype = jnp.bfloat16
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 50, HEADS, WIDTH)) * np.exp2(rng.integers(-30, 30, (4, 50, HEADS, 1)))
    on_grid = as_cached(jnp.asarray(x, dtype), FP8)
    assert FP8.quant is not None
    again = quantize(on_grid.astype(jnp.float32), FP8.quant)
    np.testing.assert_array_equal(again.values.astype(jnp.float32) * again.scale, on_grid.astype(jnp.float32))
    q, keys, weights = operands(1, 2, 128)
    assert_scored(run_kernel(decode_rows(q, dtype), keys, weights), q, keys, weights, np.full((1, 2), 128))


def test_the_reference_reads_pages_and_stored_queries():
    q, keys, weights = operands(2, 2, 100)
    for of_keys in (keys, paged(keys, 32, table_of(2, 100, 32))):
        got = np.asarray(index_scores(q, of_keys, weights, implementation="reference"))
        assert_scored(got, q, keys, weights, np.full((2, 2), 100))


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def refusal(q, keys):
    weights: Any = shape(*q.shape[:3])
    return sm90.unsupported_reason(q, keys, weights)


@pytest.mark.parametrize(
    ("q", "keys", "reason"),
    [
        ((1, 1, 8, 64), shape(1, 64, 64), "keys are not quantised: it reads E4M3 or E2M1 codes"),
        ((1, 1, 8, 64), index_format("bfloat16"), "keys are bfloat16: it reads E4M3 or E2M1 codes"),
        (
            (1, 1, 8, 64),
            entry_format("fp8_tensor", 0),
            "it takes e4m3 with a float32 scale for each, and e2m1:1x32:ue8m0",
        ),
        ((1, 1, 8, 64), entry_format("int8", 0), "keys are int8:row:float32: it takes e4m3"),
        ((1, 1, 8, 16), FP8, "keys of 16 channels: it takes 32, 64, 128"),
        ((1, 1, 136, 64), FP8, "136 heads: it takes up to 128"),
        ((1, 0, 8, 64), FP8, "there is nothing to score"),
    ],
)
def test_refusals(q, keys, reason):
    if not hasattr(keys, "shape"):
        keys = jax.eval_shape(lambda: encode_rows(jnp.zeros((1, 64, q[-1])), keys))
    with pretend(KINDS["H100 / H200"]):
        assert reason in (refusal(shape(*q), keys) or "")
    with pretend(KINDS["A100"]):
        assert "A100 is no Hopper GPU" in (refusal(shape(*q), keys) or "")


@pytest.mark.parametrize("page", [8, 48, 96, 192])
def test_refused_pages(page):
    _, keys, _ = operands(1, 1, 192)
    with pretend(KINDS["H100 / H200"]):
        reason = refusal(shape(1, 1, 8, 64), paged(keys, page))
    assert reason == f"pages of {page} keys: it takes 32, 64, and multiples of 128"


def test_a_named_kernel_is_refused_elsewhere():
    with (
        pretend(KINDS["CPU"]),
        pytest.raises(UnsupportedError, match="index_scores cannot run: sm90: CPU is no Hopper GPU"),
    ):
        index_scores(*operands(1, 1, 8), implementation="sm90")


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 4096])
@pytest.mark.parametrize(("fp4", "stages"), [(False, MOST_STAGES), (True, FP4_STAGES)])
def test_buffers_fit(tokens, fp4, stages):
    tiling = default_tiling(tokens, 64, 128, fp4)
    assert tokens % tiling.tokens == 0 and tiling.stages == stages
    most = default_tiling(tokens, MOST_HEADS, 128, fp4)
    assert most.stages >= 2 and most.stages % most.teams == 0


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (35, 1), (3, 4), (1, 2048)])
def test_lowers_for_a_gpu(batch, tokens):
    """What the interpreter does not know: layouts and transfers."""
    q, keys, weights = jax.eval_shape(lambda: operands_of_shape(batch, tokens))
    run = jax.jit(sm90.index_scores)
    run.trace(q, keys, weights, shape(batch, tokens, dtype=jnp.int32)).lower(lowering_platforms=("cuda",))


def operands_of_shape(batch, tokens) -> tuple[Rows, Pages, jax.Array]:
    q = encode_rows(jnp.zeros((batch, tokens, 64, 128)), FP8)
    keys = paged(encode_rows(jnp.zeros((batch, 256, 128)), FP8), 64)
    return q, keys, jnp.zeros((batch, tokens, 64))


def test_a_benchmark_computes_what_it_says():
    case = bench.bench(ScoreCase("small", 2, 1, 192, HEADS, WIDTH))
    sets = case.inputs(jax.random.key(0))
    with interpreted():
        got = jax.block_until_ready(case.ours["sm90"](sets))
    assert case.wrong(got, case.reference(sets)) is None
    assert case.wrong(-got, case.reference(sets)) and len(list(bench.benches())) >= 3

"""Top-k on Hopper against the reference: the same indices in the same order, whatever the scores are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench import top_k as bench
from pallas_kernels.device import KINDS, pretend
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.mosaic import interpreted
from pallas_kernels.top_k import kernel_sm90, rank, reference, sm90, top_k
from pallas_kernels.top_k.cases import BENCH, TopKCase
from pallas_kernels.top_k.kernel_sm90 import TURNS
from pallas_kernels.top_k.tiling import BLOCK, MOST_CHOSEN, MOST_ENTRIES, SINGLE, TILES, default_tiling, tiled
from pallas_kernels.top_k.warpgroup import BINS, NOWHERE

HOPPER = KINDS["H100 / H200"]
SMEM = 227 * 1024
NEGATIVE_NAN = np.array(0xFFC00000, np.uint32).view(np.float32)


def scores_of(kind, rows, columns):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, columns)).astype(np.float32)
    if kind == "ties":
        x = np.round(x)
    if kind == "equal":
        x[:] = -1.5
    if kind == "minus infinity":
        x[:, 3:] = -np.inf
    if kind == "negative":
        x = -np.exp(3 * x)
    if kind == "strange":
        x = rng.choice(np.array([np.nan, NEGATIVE_NAN, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0], np.float32), x.shape)
    if kind == "one tile":  # all of the best are neighbours, and ties among them
        x[:, 40:80] = np.round(x[:, 40:80]) + 20
    return x


def check(scores, k, counts, tile, warpgroups=None):
    """Entries behind the count are spoiled: what is read of them would show."""
    scores, counts = np.array(scores), np.asarray(counts, np.int32)
    for row, shown in zip(scores, counts, strict=True):
        row[max(shown, 0) :] = np.resize([np.nan, np.inf], len(row) - max(shown, 0))
    arguments = jnp.asarray(scores), k, jnp.asarray(counts)
    with interpreted():
        got = jax.block_until_ready(kernel_sm90.top_k(*arguments, tiled(scores.shape[1], k, tile, warpgroups)))
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, reference.top_k(*arguments))


KINDS_OF_SCORES = "normal", "ties", "equal", "minus infinity", "negative", "strange", "one tile"


def every_kind(counts, columns):
    rows = [scores_of(kind, len(counts), columns) for kind in KINDS_OF_SCORES]
    return np.concatenate(rows), [*counts] * len(rows)


def test_short_rows():
    """Nothing, one entry, about k, and all are shown."""
    k, columns = 5, 100
    scores, counts = every_kind([0, 1, k, k + 1, columns], columns)
    check(scores, k, counts, tile=1)


def test_long_rows():
    scores, counts = every_kind([BLOCK - 7], BLOCK)
    check(scores, 30, counts, tile=16)


def test_counts_about_tiles_and_blocks():
    counts = [0, 1, 15, 16, 17, BLOCK - 1, BLOCK, BLOCK + 1]
    check(scores_of("ties", len(counts), 2 * BLOCK), 20, counts, tile=16)


@pytest.mark.parametrize(("tile", "columns"), [(1, 600), (8, BLOCK)])
def test_warpgroups_that_share_a_row(tile, columns):
    check(scores_of("ties", 1, columns), 200, [columns - 3], tile, warpgroups=2)


@pytest.mark.parametrize(("k", "columns"), [(1, 1), (128, 128), (300, 300), (257, 2049), (2048, 4096)])
def test_sizes(k, columns):
    check(scores_of("ties", 1, columns), k, [columns], tile=1)


@pytest.mark.parametrize("tile", TILES)
def test_every_tile_even_where_all_of_them_are_taken(tile):
    k = 2 * BLOCK // tile if tile == 32 else 50
    check(scores_of("ties", 1, 2 * BLOCK), k, [2 * BLOCK], tile)


def test_a_row_depends_on_no_other():
    scores, counts, order = scores_of("ties", 3, 64), np.array([64, 10, 3], np.int32), [2, 0, 1]
    with interpreted():
        run = functools.partial(kernel_sm90.top_k, tiling=default_tiling(64, 8))
        whole = jax.block_until_ready(run(jnp.asarray(scores), 8, jnp.asarray(counts)))
        permuted = jax.block_until_ready(run(jnp.asarray(scores[order]), 8, jnp.asarray(counts[order])))
    np.testing.assert_array_equal(permuted, np.asarray(whole)[order])


def test_through_the_api():
    scores, counts = scores_of("ties", 2, 12).reshape(2, 1, 12), jnp.array([[12], [4]], jnp.int32)
    with pretend(HOPPER), interpreted():
        got = jax.block_until_ready(top_k(jnp.asarray(scores), 20, counts, implementation="sm90"))
    np.testing.assert_array_equal(got, top_k(jnp.asarray(scores), 20, counts, implementation="reference"))


@pytest.mark.parametrize(
    ("rows", "columns", "k", "dtype", "reason"),
    [
        (1, 64, 8, jnp.bfloat16, "scores are bfloat16 and counts int32: it takes float32 and int32"),
        (1, 2 * MOST_ENTRIES, 8, jnp.float32, "a row of 524288 entries: it takes 1 to 262144"),
        (1, 8192, 4096, jnp.float32, "the 4096 best: it takes 1 to 2048"),
        (1, 8192, 0, jnp.float32, "the 0 best: it takes 1 to 2048"),
        (1, SINGLE + 1, 8, jnp.float32, f"a row of {SINGLE + 1} entries: above {SINGLE} it takes multiples of {BLOCK}"),
        (0, 64, 8, jnp.float32, "there are no rows"),
        (1, 64, 4096, jnp.float32, None),
        (1, MOST_ENTRIES, MOST_CHOSEN, jnp.float32, None),
    ],
)
def test_refusals(rows, columns, k, dtype, reason):
    scores, counts = jax.ShapeDtypeStruct((rows, columns), dtype), jax.ShapeDtypeStruct((rows,), jnp.int32)
    with pretend(HOPPER):
        assert sm90.unsupported_reason(scores, k, counts) == reason


def test_a_named_kernel_is_refused_elsewhere():
    with pretend(KINDS["CPU"]), pytest.raises(UnsupportedError, match="top_k cannot run: sm90: CPU is no Hopper GPU"):
        top_k(jnp.zeros((1, 8)), 2, jnp.array([8]), implementation="sm90")


def test_shared_memory_holds_what_a_tiling_asks_for():
    for columns in (1, SINGLE, *range(SINGLE + BLOCK, MOST_ENTRIES + 1, BLOCK)):
        for k in (1, 512, 1024, MOST_CHOSEN):
            tiling = default_tiling(columns, min(k, columns))
            arrays = [tiling.held_keys, tiling.held_places, tiling.picked, TURNS * (BINS + NOWHERE), 6]
            arrays += [rank.HELD_BINS] * 2 if tiling.ranked else []
            kilobytes = sum(-(-4 * words // 1024) for words in arrays)
            assert 1024 * kilobytes <= SMEM, f"the {k} best of {columns}"


LARGE = TopKCase("large", 1, 133120, MOST_CHOSEN)  # what shared memory has just room for


@pytest.mark.parametrize("case", [BENCH[0], TopKCase("odd", 3, 77, 5), LARGE], ids=lambda case: case.name)
def test_lowers_for_a_gpu(case):
    sets = jax.eval_shape(functools.partial(bench.inputs, case), jax.eval_shape(lambda: jax.random.key(0)))
    bench.run.trace(case.k, sets).lower(lowering_platforms=("cuda",))


def test_a_benchmark_computes_what_it_says():
    case = bench.bench(TopKCase("small", 2, 70, 6))
    sets = case.sets(1)[0]
    want = case.reference(sets)
    with interpreted():
        got = jax.block_until_ready(case.ours["sm90"](sets))
    assert case.wrong(got, want) is None and case.wrong(got + 1, want) == "12 of 12 entries differ"

"""The Hopper kernel of indexer scores on FP4 keys, in the interpreter: the definition on the dequantised keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.device import KINDS, pretend
from pallas_kernels.index_scores import sm90
from pallas_kernels.index_scores.tiling import ScoreTiling
from pallas_kernels.mosaic.e2m1_registers import SPREAD
from pallas_kernels.quant import Rows, paged
from pallas_kernels.row_format import index_format
from tests.kernels.compiled import decode_rows, encode_rows
from tests.kernels.test_index_scores_sm90 import assert_scored, hide, refusal, run_kernel, shape, table_of

FP4 = index_format("fp4")
HEADS, WIDTH = 8, 64
ONE = 127  # the code of the scale 1
NEAR, FAR = SPREAD, 2 * SPREAD


def rows(rng, shape, spread):
    """All sixteen codes, and scales within 2^spread of 2^-12 to 2^20 of a row."""
    *leading, width = shape
    scale = ONE + rng.integers(-12, 21, (*leading, 1)) - rng.integers(0, spread + 1, (*leading, width // 32))
    body = rng.integers(0, 256, (*leading, width // 2))
    return Rows(jnp.asarray(body, jnp.uint8), None, jnp.asarray(scale, jnp.uint8), FP4)


def operands(batch, tokens, entries, heads=HEADS, width=WIDTH, spreads=(NEAR, NEAR), seed=0):
    """Queries and keys of these spreads, and weights of both signs."""
    rng = np.random.default_rng(seed)
    q, keys = rows(rng, (batch, tokens, heads, width), spreads[0]), rows(rng, (batch, entries, width), spreads[1])
    return q, keys, jnp.asarray(rng.normal(size=(batch, tokens, heads)), jnp.float32)


@pytest.mark.parametrize(("page", "entries", "width"), [(32, 100, 128), (64, 300, 64), (256, 300, 32)])
def test_pages(page, entries, width):
    """Counts around a page and an item, pages shuffled, NaN scales and nonsense behind the wanted ones."""
    counts = jnp.array([[0], [1], [page - 1], [page], [page + 1], [entries]], jnp.int32)
    q, keys, weights = operands(len(counts), 1, entries, width=width)
    pages = hide(paged(keys, page, table_of(len(counts), entries, page)), counts)
    assert_scored(run_kernel(q, pages, weights, counts), q, keys, weights, counts)


@pytest.mark.parametrize(
    ("batch", "tokens", "entries", "heads", "width"),
    [(1, 1, 300, 64, 128), (2, 3, 256, 8, 64), (1, 8, 130, 4, 32)],
)
def test_rows(batch, tokens, entries, heads, width):
    """One token and several, whose counts differ; heads that are no multiple of eight, as the shipped model's four."""
    q, keys, weights = operands(batch, tokens, entries, heads, width)
    counts = np.random.default_rng(1).integers(0, entries + 9, (batch, tokens)).astype(np.int32)
    assert_scored(run_kernel(q, keys, weights, jnp.asarray(counts)), q, keys, weights, counts)


@pytest.mark.parametrize("spreads", [(NEAR, FAR), (FAR, NEAR), (FAR, FAR)], ids=["keys", "queries", "both"])
@pytest.mark.parametrize("width", [64, 128])
def test_scales_that_no_table_holds(spreads, width):
    """Some rows of the batch have scales too far apart to be folded: one group of channels at a time is exact too."""
    q, keys, weights = operands(2, 2, 128, width=width, spreads=spreads)
    counts = np.full((2, 2), 128, np.int32)
    assert_scored(run_kernel(q, keys, weights, jnp.asarray(counts)), q, keys, weights, counts)


def test_values_are_quantised_as_the_keys_are():
    """Queries of values on the format's grid come out as they are, and so do the scores of encoded ones."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 2, HEADS, WIDTH)), jnp.float32)
    _, keys, weights = operands(1, 2, 128)
    q, counts = encode_rows(x, FP4), np.full((1, 2), 128)
    assert_scored(run_kernel(decode_rows(q, jnp.bfloat16), keys, weights), q, keys, weights, counts)


def test_teams_take_turns(monkeypatch):
    """Two pairs of warpgroups, and units whose items do not come out even."""
    monkeypatch.setattr(sm90, "default_tiling", lambda *_: ScoreTiling(1, 4, 2))
    q, keys, weights = operands(3, 1, 640)
    counts = np.array([[640], [100], [390]], np.int32)
    assert_scored(run_kernel(q, keys, weights, jnp.asarray(counts)), q, keys, weights, counts)


@pytest.mark.parametrize(("width", "page", "taken"), [(128, 32, "32, 64, and "), (64, 32, "64, and "), (32, 64, "")])
def test_pages_of_few_scales_are_refused(width, page, taken):
    keys = encode_rows(jnp.zeros((1, 192, width)), FP4)
    with pretend(KINDS["H100 / H200"]):
        reason = refusal(shape(1, 1, 8, width), paged(keys, page))
        assert (reason is None) == (width == 128)
        reason = refusal(shape(1, 1, 8, width), paged(keys, 96))
    assert reason == f"pages of 96 keys: it takes {taken}multiples of 128"


@pytest.mark.parametrize(("batch", "tokens", "width"), [(1, 1, 128), (35, 1, 64), (3, 4, 32), (1, 2048, 128)])
def test_lowers_for_a_gpu(batch, tokens, width):
    """What the interpreter does not know: layouts, transfers and permutations of bytes."""

    def operands_of_shape():
        q = encode_rows(jnp.zeros((batch, tokens, 64, width)), FP4)
        keys = paged(encode_rows(jnp.zeros((batch, 256, width)), FP4), 128)
        return q, keys, jnp.zeros((batch, tokens, 64))

    run = jax.jit(sm90.index_scores)
    args = *jax.eval_shape(operands_of_shape), shape(batch, tokens, dtype=jnp.int32)
    run.trace(*args).lower(lowering_platforms=("cuda",))

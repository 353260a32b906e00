"""Full sequence, prefill in any chunks and single steps give the same logits, at every edge of window and block."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dsv4.config import CACHE_FORMATS, Execution, load_config
from dsv4.config.overrides import apply_overrides
from dsv4.decoding import run
from dsv4.decoding.run import decode_step, prefill

TOLERANCE = 2e-4  # the logits' standard deviation is 1 to 4
BATCH, TOKENS, CHUNK, STEP = 4, 264, 200, 4
SLOW_MODELS = [pytest.param(name, marks=pytest.mark.slow) for name in ("small", "mixed")]  # test_oracle has mixed too


@pytest.fixture
def full(ways):
    """(model, ids [B, T], logits [B, T, V] of one pass over the whole sequences) of a model's name."""
    return functools.partial(_full, ways)


@functools.cache
def _full(ways, name):
    model = ways.model_of(name)
    ids = ways.random_ids(model, BATCH, TOKENS)
    return model, ids, np.asarray(ways.forward(model, ids))


def assert_same(got, want):
    assert np.isfinite(want).all()
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)


def prompts_then_steps(ways, model, ids, want, lengths, steps):
    """Prompts of these lengths in one padded call, then `steps` single tokens; every logit against `want`."""
    lengths = np.array(lengths)
    zeros, cache = np.zeros(BATCH, int), ways.empty(model, BATCH, TOKENS)
    logits, cache = ways.feed(model, ids, zeros, lengths, CHUNK, cache)
    for b, length in enumerate(lengths):
        assert_same(logits[b, :length], want[b, :length])
    for step in range(steps):
        logits, cache = ways.feed(model, ids, lengths + step, np.ones(BATCH, int), STEP, cache)
        assert_same(logits[:, 0], want[range(BATCH), lengths + step])


@pytest.mark.parametrize("name", ["tiny", "small's kinds", *SLOW_MODELS])
def test_prompts_around_the_window(ways, full, name):
    """Lengths 1 and window - 1, window, window + 1, then all residues mod 4; five steps behind each."""
    model, ids, want = full(name)
    window = model.config.attention.window
    prompts_then_steps(ways, model, ids, want, [1, window - 1, window, window + 1], steps=5)
    prompts_then_steps(ways, model, ids, want, [2, window + 2, window + 3, 4 * window // 3], steps=5)


@pytest.mark.parametrize("name", ["tiny", *SLOW_MODELS])
def test_any_chunks(ways, full, name):
    """Steps of 1, 3 and 4 tokens, and chunks of 127, 128 and 200, which cut blocks and windows everywhere."""
    model, ids, want = full(name)
    few = min(TOKENS, model.config.attention.window + 12)
    for size in (1, 3, STEP):
        got, _ = ways.through_chunks(model, ids[:, :few], size, STEP, ways.empty(model, BATCH, TOKENS))
        assert_same(got, want[:, :few])
    for size in (127, 128, CHUNK):
        got, _ = ways.through_chunks(model, ids, size, CHUNK, ways.empty(model, BATCH, TOKENS))
        assert_same(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "small", "mixed"])
def test_every_position_by_single_steps(ways, full, name):
    """Every residue mod 128 and of every block: one decode of the whole sequence, token by token, in its own shape."""
    model, ids, want = full(name)
    cache = ways.empty(model, BATCH, TOKENS)
    for t in range(TOKENS):
        logits, cache = ways.feed(model, ids, np.full(BATCH, t), np.ones(BATCH, int), 1, cache)
        assert_same(logits[:, 0], want[:, t])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "small", "mixed"])
def test_prompts_of_every_length(ways, full, name):
    """1 to 132 tokens, and the two steps behind each."""
    model, ids, want = full(name)
    for first in range(1, 133, BATCH):
        prompts_then_steps(ways, model, ids, want, first + np.arange(BATCH), steps=2)


@pytest.fixture
def quick_public(ways, monkeypatch):
    """The public functions, over programs that other tests compile."""
    monkeypatch.setattr(run, "extend", ways.extend)
    monkeypatch.setattr(run, "last_logits", ways.last_logits)


def test_public_prefill_of_ragged_prompts(ways, full, quick_public):
    """Chunks end inside, at and behind a row's end; each row's logits are those of its own last token."""
    model, ids, want = full("tiny")
    lengths = np.array([3, 8, 9, 24])
    chunked = model.replace(execution=Execution(prefill_chunk=8))
    logits, cache = prefill(chunked, ids[:, :24], lengths=lengths, capacity=TOKENS)
    assert cache.length.tolist() == lengths.tolist()
    assert_same(logits, want[range(BATCH), lengths - 1])
    more, cache = prefill(chunked, ids[:, 24:32], lengths=np.array([1, 1, 1, 8]), cache=cache)
    assert_same(more[3], want[3, 31])
    logits, cache = decode_step(model, ids[:, 32:36], cache, count=np.array([0, 0, 0, 3]))
    assert_same(logits[3, :3], want[3, 32:35])
    assert cache.length.tolist() == [4, 9, 10, 35]


def small_variant(*overrides):
    """A two-layer model that differs from `tiny` in what is named."""
    config = load_config("tiny").model
    return apply_overrides(config, ["layers=csa:4,hca:8", "mtp_blocks=0", "vocab_size=64", *overrides])


VARIANTS = {
    "no sink": ("attention.sink=false",),
    "no yarn": ("attention.yarn=none",),
    "plain residual": ("residual.kind=plain",),
    "two streams": ("residual.streams=2",),
    "sigmoid scoring": ("moe.scoring=sigmoid",),
    "softmax scoring": ("moe.scoring=softmax",),
    "weights not normalised": ("moe.normalize=false",),
    "csa of 2": ("layers=csa:2,window",),
    "csa of 8": ("layers=csa:8,hca:3",),
    "hca of 3": ("layers=hca:3,window",),
    "no hash layer": ("moe.hash_layers=0",),
    "all hash layers": ("moe.hash_layers=2",),
    "no shared expert": ("moe.shared=0",),
    "two shared experts": ("moe.shared=2",),
    "no swiglu limit": ("moe.swiglu_limit=0",),
    "tight swiglu limit": ("moe.swiglu_limit=0.3",),
    "window of 1": ("attention.window=1",),
    "one entry selected": ("indexer.top_k=1",),
    "full beside csa": ("layers=full,csa:4",),
}
# Several of them at once: what the fast run can afford.
COMBINED = (
    "layers=csa:2,hca:3", "attention.sink=false", "attention.window=1", "moe.scoring=softmax", "moe.hash_layers=0",
    "moe.shared=0", "moe.swiglu_limit=0", "indexer.top_k=1",
)  # fmt: skip


def variant_config(overrides):
    if "residual.kind=plain" in overrides:
        config = small_variant(*(o for o in overrides if o != "residual.kind=plain"))
        return dataclasses.replace(config, residual=dataclasses.replace(config.residual, kind="plain", streams=1))
    return small_variant(*overrides)


def assert_three_ways(ways, config, tokens=27):
    model = ways.random_model(config)
    ids = ways.random_ids(model, 2, tokens)
    want = np.asarray(ways.forward(model, ids))
    got, _ = ways.through_chunks(model, ids, 1, 1, ways.empty(model, 2, tokens))
    assert_same(got, want)
    return model, ids, want


def test_many_settings_at_once(ways):
    assert_three_ways(ways, variant_config(COMBINED))


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(ways, name):
    model, ids, want = assert_three_ways(ways, variant_config(VARIANTS[name]))
    got, _ = ways.through_chunks(model, ids, 10, 10, ways.empty(model, 2, ids.shape[1]))
    assert_same(got, want)


def test_the_dense_control(ways):
    """Full attention, one dense expert, a plain residual: the same three ways, and up to the end of the cache.

    A full layer's ring is the cache itself: a step that crosses its end must not take the place of the first tokens.
    """
    config = load_config("small_dense").model
    attention = dataclasses.replace(config.attention, heads=4, head_dim=16, rope_dim=8, q_lora_rank=24, o_lora_rank=12)
    moe = dataclasses.replace(config.moe, expert_width=24)
    config = dataclasses.replace(
        config, layers=config.layers[:2], vocab_size=64, width=32, attention=attention, moe=moe
    )
    model, capacity = ways.random_model(config), 27
    ids = ways.random_ids(model, 2, capacity + STEP)
    want = np.asarray(ways.forward(model, ids))
    changed = np.where(np.arange(ids.shape[1]) == 0, (ids + 1) % 64, ids)
    assert np.abs(np.asarray(ways.forward(model, changed))[:, -1] - want[:, -1]).max() > 0.01, "all tokens are seen"
    for size, width in ((10, 10), (1, STEP), (STEP, STEP)):
        got, cache = ways.through_chunks(model, ids[:, :25], size, width, ways.empty(model, 2, capacity))
        assert_same(got, want[:, :25])
    logits, crossed = ways.feed(model, ids, [25, 25], [STEP, 2], STEP, cache)
    assert_same(logits[:, :2], want[:, 25:27])
    assert np.isnan(logits[0, 2:]).all()
    back = dataclasses.replace(crossed, length=cache.length)
    logits, _ = ways.feed(model, ids, [25, 25], [2, 1], STEP, back)
    assert_same(logits[0, :2], want[0, 25:27])


PRECISIONS = [
    ("bfloat16", None),
    ("float32", "bf16"),
    ("bfloat16", "float32"),
    ("float32", "fp8"),
    ("bfloat16", "fp8_fp4_index"),
    ("bfloat16", "fp8_tensor"),
    ("float32", "int8"),
]


@pytest.mark.parametrize(("dtype", "cache"), PRECISIONS)
def test_no_dtype_is_promoted_on_any_way(ways, dtype, cache):
    """Strict promotion would raise while tracing; logits are float32, and the cache keeps its own dtype."""
    execution = Execution(dtype=dtype, cache=CACHE_FORMATS.get(cache))
    model = ways.random_model(small_variant()).replace(execution=execution)
    state = ways.empty(model, 2, 32)
    for tokens in (1, 9):
        ids, count = np.zeros((2, tokens), np.int32), np.zeros(2, np.int32)
        logits, after = jax.eval_shape(run.extend_body, model, ids, count, state)
        assert logits.dtype == np.float32
        assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
    assert state.layers[0].window.format == execution.cache_format.window_format(model.config.attention)
    assert jax.eval_shape(lambda m, i: run.forward_body(m, i, False)[0], model, ids).dtype == np.float32


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "cache"), PRECISIONS)
def test_low_precision_ways_agree_as_far_as_they_can(ways, full, dtype, cache):
    """Rounding may flip a close choice of expert or entry: most tokens agree well, and all of them roughly."""
    model, ids, want = full("small")
    model = model.replace(execution=Execution(dtype=dtype, cache=CACHE_FORMATS.get(cache)))
    spread = want.std()
    whole = np.asarray(ways.forward(model, ids))
    chunks, _ = ways.through_chunks(model, ids, 128, CHUNK, ways.empty(model, BATCH, TOKENS))
    steps, _ = ways.through_chunks(model, ids[:, :140], STEP, STEP, ways.empty(model, BATCH, TOKENS))
    for got in (whole, chunks, steps):
        error = np.sqrt(np.mean((got - want[:, : got.shape[1]]) ** 2, axis=-1)) / spread
        assert np.median(error) < 0.02 and np.mean(error) < 0.05

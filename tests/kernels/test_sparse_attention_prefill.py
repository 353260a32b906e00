"""Prefill in blocks of queries: the definition's values and gradients, in memory that only its operands grow with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import listen
from pallas_kernels.row_format import entry_format
from pallas_kernels.sparse_attention import prefill_blocks, reference, sparse_attention_prefill
from tests.kernels.compiled import encode_rows

SCALE = 0.3
HEADS = 2


def case(tokens, rows, entries=0, named=0, batch=2, width=16, dtype=jnp.float32, seed=0):
    """Operands of which nothing is NaN. Queries name distinct entries, in any order, and some of them none."""
    keys = iter(jax.random.split(jax.random.key(seed), 5))
    q = jax.random.normal(next(keys), (batch, tokens, HEADS, width), dtype)
    band = jax.random.normal(next(keys), (batch, rows, width), dtype)
    compressed = index = count = None
    rng = np.random.default_rng(seed)
    if entries:
        compressed = jax.random.normal(next(keys), (batch, entries, width), dtype)
        count = rng.integers(0, entries + 1, (batch, tokens)).astype(np.int32)
    if named:
        index = np.argsort(rng.random((batch, tokens, entries)), axis=-1)[..., :named].astype(np.int32)
        index[:, ::7, 1:3] = -1
        count = rng.integers(0, named + 2, (batch, tokens)).astype(np.int32)
    start = np.array([40 * b for b in range(batch)], np.int32)
    return q, band, start, compressed, index, count, jnp.linspace(-1, 1, HEADS)


def with_gradients(attend, args, width):
    """Output, log-sum-exp and the gradients to q, band, compressed entries and sink of a sum over both."""
    q, band, start, compressed, index, count, sink = args

    def total(q, band, compressed, sink):
        out, lse = attend(q, band, start, compressed, index, count, sink, width=width, scale=SCALE)
        mixed = jnp.sum(jnp.sin(3 * out.astype(jnp.float32))) + jnp.sum(jnp.sin(jnp.where(jnp.isfinite(lse), lse, 0)))
        return mixed, (out, lse)

    inputs = {"q": q, "band": band, "compressed": compressed, "sink": sink}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    missing = {"q": q, "band": band, "compressed": None, "sink": None}
    found = jax.jit(jax.grad(lambda x: total(**(missing | x)), has_aux=True))(inputs)
    return jax.device_get(found)


@pytest.fixture
def in_blocks(monkeypatch):
    monkeypatch.setattr(prefill_blocks, "MOST", 0)


CASES = {  # tokens, rows of the band, width of the window, entries, entries that are named
    "window alone": (300, 310, 7, 0, 0),
    "one block": (129, 129, 8, 0, 0),
    "the band begins late": (200, 203, 30, 0, 0),
    "whole blocks, full attention": (256, 256, 256, 0, 0),
    "the first entries": (300, 300, 9, 20, 0),
    "few of many entries, gathered": (300, 300, 9, 90, 5),
    "many of few entries, masked": (300, 300, 9, 10, 8),
}


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_definition(name):
    tokens, rows, width, entries, named = CASES[name]
    args = case(tokens, rows, entries, named)
    want = with_gradients(reference.sparse_attention_prefill, args, width)
    got = with_gradients(prefill_blocks.sparse_attention_prefill, args, width)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5 * max(1, np.abs(theirs).max()))


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("named", [3, 40])
def test_what_is_not_read_may_be_nan_and_gets_no_gradient(named):
    """Rows of positions below 0, entries that nobody names or sees, indices behind the count."""
    tokens, entries = 260, 60
    q, band, start, compressed, index, count, sink = case(tokens, tokens + 5, entries, named)
    index = np.where(index >= 50, -1, index)
    count[0, 3], index[1, 4] = 0, -1
    seen = np.where(np.arange(named) < count[..., None], index, -1)
    read = np.array([np.isin(np.arange(entries), line) for line in seen.reshape(2, -1)])
    index = np.where(np.arange(named) < count[..., None], index, 10**9)
    held = np.ones((2, tokens + 5), bool)
    held[0, :5] = False
    args = q, jnp.where(held[..., None], band, 0), start, jnp.where(read[..., None], compressed, 0), index, count, sink
    want = with_gradients(reference.sparse_attention_prefill, args, 9)
    spoilt = jnp.where(held[..., None], band, jnp.nan), start, jnp.where(read[..., None], compressed, jnp.nan)
    got = with_gradients(prefill_blocks.sparse_attention_prefill, (q, *spoilt, index, count, sink), 9)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(np.any(got[0]["band"], axis=-1), held)
    np.testing.assert_array_equal(np.any(got[0]["compressed"], axis=-1), read)


@pytest.mark.usefixtures("in_blocks")
def test_quantised_entries_and_infinite_sinks():
    args = case(200, 200, 70, 4, width=32, dtype=jnp.bfloat16)
    for form in (entry_format("fp8", 16), entry_format("bfloat16", 0)):
        q, band, start, compressed, *named, _ = args
        call = q, band, start, encode_rows(compressed, form), *named, jnp.array([jnp.inf, -jnp.inf])
        want, got = (
            jax.jit(functools.partial(attend, width=9, scale=SCALE))(*call)
            for attend in (reference.sparse_attention_prefill, prefill_blocks.sparse_attention_prefill)
        )
        assert got[0].dtype == jnp.bfloat16
        assert not np.any(got[0][:, :, 0]) and np.any(got[0][:, :, 1])
        for ours, theirs in zip(got, want, strict=True):
            np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(theirs, np.float32), rtol=1e-2)


def largest(jaxpr):
    """The most elements that a value of a jaxpr or of one inside it has."""
    found = [np.prod(x.aval.shape) for eqn in jaxpr.eqns for x in eqn.outvars if hasattr(x.aval, "shape")]
    inner = [x for eqn in jaxpr.eqns for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr)]
    return int(max([1, *found, *(largest(getattr(x, "jaxpr", x)) for x in inner if is_jaxpr(x))]))


def is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


@pytest.mark.parametrize("named", [None, 64])
def test_nothing_of_the_size_of_queries_times_entries_exists(named):
    """Neither forward nor backward: as traced, and as what the compiled program allocates beside its operands."""

    def program(tokens):
        shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
        heads, width, entries = 4, 64, tokens // 4
        index = None if named is None else jax.ShapeDtypeStruct((1, tokens, named), jnp.int32)
        operands = (shape((1, tokens, heads, width)), shape((1, tokens, width)), shape((1, entries, width)))
        sink = jax.ShapeDtypeStruct((heads,), jnp.float32)
        names = jax.ShapeDtypeStruct((1,), jnp.int32), index, jax.ShapeDtypeStruct((1, tokens), jnp.int32)

        def total(operands, sink, names):
            (q, band, compressed), (start, index, count) = operands, names
            attended = sparse_attention_prefill(
                q, band, start, compressed, index, count, sink, width=128, scale=SCALE, implementation="reference"
            )
            return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in attended)

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1))).trace(operands, sink, names)

    short, long = (program(tokens) for tokens in (2**14, 2**15))
    tokens = 2**15
    assert largest(long.jaxpr.jaxpr) <= max(tokens * 4 * 64, 128 * tokens), "q, or what a block of 128 queries needs"
    memory = [x.lower().compile().memory_analysis().temp_size_in_bytes for x in (short, long)]
    assert memory[1] <= 2.2 * memory[0], "linear in the tokens"
    assert memory[1] <= 0.25 * tokens * tokens // 4 * 4, "bytes of one float32 [T, C]"


def test_few_logits_are_computed_at_once():
    """What models of a few megabytes train on stays the definition itself, bit for bit."""
    args = jax.tree.map(jnp.asarray, case(140, 150, 12, 4))
    with listen() as calls:
        got = sparse_attention_prefill(*args, width=9, scale=SCALE)
    assert calls[0].ran == "reference"
    want = reference.sparse_attention_prefill(*args, width=9, scale=SCALE)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours, theirs)

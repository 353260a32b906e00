"""The Hopper kernel of sparse prefill attention in the interpreter, race detection on, against the reference."""

import os

os.environ.setdefault("NPROC", "16")  # threads of XLA, each of which a simulated thread may block

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench.case import disagreement
from pallas_kernels.device import KINDS, pretend
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.mosaic import interpreted
from pallas_kernels.row_format import entry_format
from pallas_kernels.sparse_attention import api, prefill_sm90, sparse_attention_prefill
from tests.kernels.compiled import encode_rows
from tests.kernels.sums import ON_GPU

SCALE = 0.3
FP8, BF16 = entry_format("fp8", 64), entry_format("bfloat16", 0)


def case(tokens, history, entries, named, batch=1, heads=64, width=128, form=FP8, starts=(0,)):
    """NaN in rows of positions below 0, and in entries that no query reads."""
    keys = iter(jax.random.split(jax.random.key(tokens), 5))
    rng = np.random.default_rng(tokens)
    q = jax.random.normal(next(keys), (batch, tokens, heads, width), jnp.bfloat16)
    band = jax.random.normal(next(keys), (batch, history + tokens, width), jnp.bfloat16)
    start = jnp.array(starts, jnp.int32)
    held = start[:, None] + jnp.arange(history + tokens)[None] >= history
    band = jnp.where(held[..., None], band, jnp.nan)
    index = np.argsort(rng.random((batch, tokens, entries)), axis=-1)[..., :named].astype(np.int32)
    index[:, :, 1] = -1
    count = rng.integers(1, named + 1, (batch, tokens)).astype(np.int32)
    count[0, 0] = 0
    read = np.where(np.arange(named) < count[..., None], index, -1)
    used = np.array([np.isin(np.arange(entries), line) for line in read.reshape(batch, -1)])
    index = np.where(np.arange(named) < count[..., None], index, 10**9)

    def spoil(leaf):
        return jnp.where(used[..., None], leaf, jnp.full_like(leaf, 255 if leaf.dtype == jnp.uint8 else jnp.nan))

    compressed = encode_rows(jax.random.normal(next(keys), (batch, entries, width), jnp.bfloat16), form)
    compressed = jax.tree.map(spoil, compressed)
    return q, band, start, compressed, jnp.asarray(index), jnp.asarray(count), jnp.linspace(-2, 2, heads)


@functools.partial(jax.jit, static_argnames="width")
def reference(q, band, *args, width):
    """In float32."""
    q, band = (x.astype(jnp.float32) for x in (q, band))
    return sparse_attention_prefill(q, band, *args, width=width, scale=SCALE, implementation="reference")


def kernel(*args, width):
    with interpreted():
        return jax.block_until_ready(sparse_attention_prefill(*args, width=width, scale=SCALE, implementation="sm90"))


def check(got, want):
    assert disagreement(got[0], want[0]) is None
    np.testing.assert_array_equal(np.isfinite(got[1]), np.isfinite(want[1]))
    assert np.max(np.abs(np.asarray(got[1]) - want[1]), where=np.isfinite(want[1]), initial=0) <= 1e-3


def test_exactly_what_is_seen_is_read():
    args = case(5, 3, 40, 20, batch=2, starts=(0, 2))
    check(kernel(*args, width=4), reference(*args, width=4))


def test_a_window_alone_and_the_first_entries():
    """Of entries that are a plain array, as training has them; heads and channels that fill no thread block."""
    q, band, start, compressed, _, _, sink = case(4, 0, 30, 3, heads=8, width=64, form=BF16)
    plain = jnp.where(jnp.isnan(compressed.body), 1, compressed.body)
    check(
        kernel(q, band, start, None, None, None, sink, width=3), reference(q, band, start, *[None] * 3, sink, width=3)
    )
    count = jnp.array([[0, 1, 29, 30]], jnp.int32)
    args = q, band, start, plain, None, count, None
    check(kernel(*args, width=9), reference(*args, width=9))


def test_gradients_are_those_of_the_reference():
    q, band, start, compressed, index, count, sink = case(3, 0, 10, 3, heads=4, width=64, form=BF16)
    operands = q, band, jnp.where(jnp.isnan(compressed.body), 1, compressed.body), sink
    towards = jax.random.normal(jax.random.key(9), q.shape, q.dtype)

    def gradients(implementation):
        def loss(q, band, compressed, sink):
            out, lse = sparse_attention_prefill(
                q, band, start, compressed, index, count, sink, width=2, scale=SCALE, implementation=implementation
            )
            return jnp.sum((out * towards).astype(jnp.float32)) + jnp.sum(lse)

        return jax.grad(loss, argnums=(0, 1, 2, 3))(*operands)

    with interpreted():
        got = jax.block_until_ready(gradients("sm90"))
    for ours, theirs in zip(got, gradients("reference"), strict=True):
        assert jnp.any(theirs != 0)
        # A GPU need not add twice in one order.
        bound = 2.0**-20 if ON_GPU else 0
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (ours, theirs)), rtol=bound, atol=bound)


def test_the_rows_of_a_window():
    """Positions of the band's rows are start - 2 and on."""
    rows = prefill_sm90.window_rows(jnp.array([0, 1, 7]), 3, 5, 4)
    np.testing.assert_array_equal(rows[0], [[-1, -1, -1, 2], [-1, -1, 2, 3], [-1, 2, 3, 4]])
    np.testing.assert_array_equal(rows[1], [[-1, -1, 1, 2], [-1, 1, 2, 3], [1, 2, 3, 4]])
    np.testing.assert_array_equal(rows[2], [[-1, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4]])


def shapes(width=512, dtype=jnp.bfloat16, tokens=300, entries=jnp.bfloat16):
    """Arguments of the op that nobody computes with."""

    def build():
        compressed = encode_rows(jnp.zeros((2, 8, width)), FP8) if entries is FP8 else jnp.zeros((2, 8, width), entries)
        index, count = jnp.zeros((2, tokens, 4), jnp.int32), jnp.zeros((2, tokens), jnp.int32)
        start, sink = jnp.zeros(2, jnp.int32), jnp.zeros(64)
        return (
            jnp.zeros((2, tokens, 64, width), dtype), jnp.zeros((2, tokens, width), dtype),
            start, compressed, index, count, sink,
        )  # fmt: skip

    return jax.eval_shape(build)


def reason(*args, width=128):
    with pretend(KINDS["H100 / H200"]), pytest.raises(UnsupportedError) as error:
        api.PREFILL.choose(args, {"width": width, "scale": 1.0}, "sm90")
    return str(error.value)


def test_what_it_does_not_take():
    how = {"width": 128, "scale": 1.0}
    with pretend(KINDS["H100 / H200"]):
        for entries in (FP8, jnp.bfloat16):
            assert api.PREFILL.choose(shapes(entries=entries), how)[0].name == "sm90"
    assert "640 channels" in reason(*shapes(width=640))
    assert "float32: it takes bfloat16" in reason(*shapes(dtype=jnp.float32))
    assert "entries are float32" in reason(*shapes(entries=jnp.float32))
    assert "a window of 2000 rows" in reason(*shapes(tokens=1500), width=2000)
    assert "the window of 0 rows" in reason(*shapes(), width=0)


def test_a_named_kernel_is_refused_elsewhere():
    with pretend(KINDS["CPU"]), pytest.raises(UnsupportedError, match="CPU is no Hopper GPU"):
        api.PREFILL.choose(shapes(), {"width": 128, "scale": 1.0}, "sm90")


def test_it_lowers_for_a_gpu_that_need_not_be_there():
    def run(*args):
        with pretend(KINDS["H100 / H200"]):
            return sparse_attention_prefill(*args, width=128, scale=SCALE, implementation="sm90")

    for entries in (FP8, jnp.bfloat16):
        jax.jit(run).trace(*shapes(entries=entries)).lower(lowering_platforms=("cuda",))

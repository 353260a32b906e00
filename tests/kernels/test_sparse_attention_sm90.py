"""The Hopper kernel of sparse decode attention in the interpreter, race detection on, against the reference."""

import dataclasses
import os

os.environ.setdefault("NPROC", "16")  # threads of XLA, each of which a simulated thread may block

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench.case import disagreement
from pallas_kernels.device import KINDS, pretend
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.mosaic import interpreted
from pallas_kernels.quant import Pages, Rows, paged
from pallas_kernels.quant.pages import page_bytes
from pallas_kernels.rotary import rotation
from pallas_kernels.row_format import entry_format
from pallas_kernels.sparse_attention import api, sm90, sparse_attention
from pallas_kernels.sparse_attention import kernel_sm90 as few_sm90
from pallas_kernels.sparse_attention.many import kernel_sm90 as many_sm90
from pallas_kernels.sparse_attention.tiling import MOST, Division, divide, takes_many
from tests.kernels.compiled import encode_rows

FORM = entry_format("fp8", 64)
WIDTH, FULL, SCALE = 128, 512, 512**-0.5  # channels of most tests, where 512 would take four times as long


@jax.jit
def reference(q, *args, turned=None):
    how = {"implementation": "reference", "scale": SCALE, "rotation": turned}
    return sparse_attention(q.astype(jnp.float32), *args, **how)


def kernel(*args, turned=None):
    with interpreted():
        args = jax.tree.map(jnp.asarray, args)
        how = {"implementation": "sm90", "scale": SCALE, "rotation": turned}
        return jax.block_until_ready(sparse_attention(*args, **how))


def kernel_of_parts(parts, *args, turned=None, slices=1):
    """The entries of a query, and its channels, divided among so many thread blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sm90, "divide", lambda *_: Division(parts, slices))
        forget()
        found = kernel(*args, turned=turned)
    forget()
    return found


def forget():
    """What has been traced: calls of the same shapes would run as they were divided then."""
    api.DECODE.candidates[0].run.clear_cache()


def turns(batch, tokens, half):
    """How each token's output is turned: another way for every one."""
    position = 1000 * jnp.arange(batch * tokens).reshape(batch, tokens)
    return rotation(position, jnp.linspace(0.1, 1, half)).inverse


def check(got, want):
    """Each query by itself: they differ in how many entries they have, and so in size."""
    each = (np.asarray(x[0], np.float32).reshape(-1, *x[0].shape[2:]) for x in (got, want))
    for ours, theirs in zip(*each, strict=True):
        assert disagreement(ours, theirs) is None
    np.testing.assert_array_equal(np.isfinite(got[1]), np.isfinite(want[1]))
    finite = np.isfinite(want[1])
    assert np.max(np.abs(np.asarray(got[1]) - want[1]), where=finite, initial=0) <= 1e-3


def rows(key, batch, count, width=WIDTH, form=FORM):
    """Entries whose tiles differ in size by powers of two."""
    values, spread = jax.random.split(jax.random.key(key))
    size = jnp.exp2(jax.random.randint(spread, (batch, count, width // 16), -2, 1).astype(jnp.float32))
    return encode_rows(jax.random.normal(values, (batch, count, width)) * size.repeat(16, -1), form)


def poisoned(entries, read):
    """NaN in every entry that is not in read [B, N] (bool), in its codes, its rotary channels and its scales."""

    def spoil(leaf):
        nan = jnp.full_like(leaf, 255 if leaf.dtype == jnp.uint8 else jnp.nan)
        return jnp.where(read[..., None], leaf, nan)

    return jax.tree.map(spoil, entries)


def named(count, index):
    """Which of `count` entries are in a list of index [B, T, n]."""
    flat = np.asarray(index).reshape(index.shape[0], -1)
    return np.array([np.isin(np.arange(count), line[line >= 0]) for line in flat])


def shuffled(entries, page_size, seed=0):
    """In pages that lie anywhere."""
    batch, count, _ = entries.shape
    pages = -(-count // page_size)
    table = np.random.default_rng(seed).permutation(batch * pages).reshape(batch, pages)
    return paged(entries, page_size, jnp.asarray(table, jnp.int32))


def queries(key, batch, tokens, heads=64, width=WIDTH):
    return jax.random.normal(jax.random.key(key), (batch, tokens, heads, width), jnp.bfloat16)


@pytest.fixture(params=["few", "many"])
def which(request, monkeypatch):
    """Both kernels: for thread blocks with few blocks of entries, and with many. A test runs that one alone."""
    ran = set()

    def watched(name, module):
        attend = module.attend

        def run(*args, **how):
            ran.add(name)
            return attend(*args, **how)

        monkeypatch.setattr(module, "attend", run)

    watched("few", few_sm90)
    watched("many", many_sm90)
    monkeypatch.setattr(sm90, "takes_many", lambda *_: request.param == "many")
    if request.param == "many":  # for queries that are not divided
        monkeypatch.setattr(sm90, "divide", lambda *_: Division())
    forget()
    yield request.param
    forget()
    assert ran == {request.param}


SINK = np.concatenate([np.linspace(-3, 3, 62), [np.inf, -np.inf]]).astype(np.float32)


def hostile():
    """Everything that an index may say, and NaN wherever it says nothing."""
    rng = np.random.default_rng(0)
    batch, tokens, slots, capacity = 2, 2, 40, 90
    window_index = rng.integers(-1, slots, (batch, tokens, 40)).astype(np.int32)
    index = rng.integers(-1, capacity, (batch, tokens, 70)).astype(np.int32)
    count = np.array([[0, 1], [70, 64]], np.int32)
    window_index[0] = -1  # a query without any entry, and one with a single one
    index[0, 1, 0] = 89
    window_index[1, 0, 5:9] = window_index[1, 0, 4] = 7  # one entry five times
    index[1, 1, 10:20] = -1
    seen = np.arange(70) < count[..., None]
    read = np.where(seen, index, -1)
    index = np.where(seen, index, 10**9)  # absurd, but behind the count
    window = poisoned(rows(1, batch, slots), named(slots, window_index))
    compressed = poisoned(rows(2, batch, capacity), named(capacity, read))
    return queries(0, batch, tokens), window, window_index, compressed, index, count


def test_exactly_the_named_entries_are_read(which):
    """By two thread blocks a query, of which some have nothing to read, in the kernel that divides queries."""
    q, window, window_index, compressed, index, count = hostile()
    back = turns(2, 2, 32)
    want = reference(q, window, window_index, compressed, np.where(index < 90, index, -1), count, SINK, turned=back)
    parts = {"few": 2, "many": 1}[which]
    got = kernel_of_parts(parts, q, window, window_index, shuffled(compressed, 7), index, count, SINK, turned=back)
    check(got, want)
    assert np.isfinite(np.asarray(got[0], np.float32)).all()
    assert not np.any(got[0][0, 0]) and np.isneginf(got[1][0, 0]).all(), "no entry: output 0, lse -inf"
    assert not np.any(got[0][:, :, 62]), "sink +inf: output 0"


@pytest.mark.parametrize(("width", "slices"), [(256, 2), (512, 4)])
def test_slices_of_channels_are_added_apart(width, slices):
    """By thread blocks of which each scores all of its part's entries; and some parts have none."""
    entries, sink = rows(1, 1, 100, width), np.linspace(-1, 1, 64, dtype=np.float32)
    index = np.random.default_rng(4).integers(-1, 100, (1, 1, 70)).astype(np.int32)
    args = queries(0, 1, 1, width=width), entries, index, None, None, None, sink
    back = turns(1, 1, 32)
    check(kernel_of_parts(3, *args, turned=back, slices=slices), reference(*args, turned=back))


@pytest.mark.usefixtures("which")
def test_the_first_entries_in_order_and_more_heads():
    """Without an index the count alone says what is seen: around a page, and none."""
    lengths = np.array([[0], [1], [15], [16], [17]], np.int32)
    batch = lengths.shape[0]
    compressed = poisoned(rows(2, batch, 40), np.arange(40) < lengths)
    window, window_index = rows(1, batch, 3), np.tile(np.array([0, -1, 2], np.int32), (batch, 1, 1))
    q, back = queries(0, batch, 1, heads=128), turns(batch, 1, 32)
    want = reference(q, window, window_index, compressed, None, lengths, None, turned=back)
    pages = [shuffled(x, size) for x, size in ((window, 3), (compressed, 16))]
    got = kernel(q, pages[0], window_index, pages[1], None, lengths, None, turned=back)
    check(got, want)


@pytest.mark.usefixtures("which")
def test_a_permuted_batch_gives_permuted_bits():
    """And a window alone, numbered through the pool."""
    batch = 4
    window = dataclasses.replace(shuffled(rows(1, batch, 32), 8), table=None)
    window_index = np.random.default_rng(3).integers(-1, window.rows, (batch, 1, 96)).astype(np.int32)
    q, order = queries(0, batch, 1), np.array([3, 0, 2, 1])
    first = kernel(q, window, window_index, None, None, None, SINK)
    check(first, reference(q, window, window_index, None, None, None, SINK))
    second = kernel(q[order], window, window_index[order], None, None, None, SINK)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(np.asarray(one)[order], np.asarray(other))


@pytest.mark.parametrize("exponent", [-22, 15])
@pytest.mark.usefixtures("which")
def test_scales_at_the_ends_of_their_range(exponent):
    """2^-22 and 2^15: more than float16 has on either side."""
    batch, count = 1, 40
    entries = rows(1, batch, count, FULL)
    entries = dataclasses.replace(entries, scale=jnp.full_like(entries.scale, 127 + exponent))
    index = np.arange(count, dtype=np.int32)[None, None]
    q = queries(0, batch, 1, width=FULL) * 2.0 ** -max(exponent, 0)
    want = reference(q, entries, index, None, None, None, None)
    check(kernel(q, entries, index, None, None, None, None), want)


@pytest.mark.parametrize("count", [128, 300])
@pytest.mark.usefixtures("which")
def test_logits_that_grow(count):
    """Every block exceeds what the one before it is relative to, the last one too."""
    entries = rows(1, 1, count)
    scale = entries.scale.astype(jnp.int32) + (jnp.arange(count) // 60)[None, :, None]
    entries = dataclasses.replace(entries, scale=scale.astype(entries.scale.dtype))
    args = queries(0, 1, 1) * 2, entries, np.arange(count, dtype=np.int32)[None, None], None, None, None, SINK
    check(kernel(*args), reference(*args))


@pytest.mark.parametrize(("kind", "width", "rotary", "heads"), [("fp8", 64, 16, 8), ("bfloat16", 96, 0, 8)])
@pytest.mark.usefixtures("which")
def test_other_sizes(kind, width, rotary, heads):
    """Tiles that rows do not fill, and heads that do not fill a thread block."""
    batch, count, form = 2, 70, entry_format(kind, rotary)
    q = queries(0, batch, 1, heads, width)
    window, compressed = (rows(key, batch, count, width, form) for key in (1, 2))
    index = np.random.default_rng(0).integers(-1, count, (2, batch, 1, 40)).astype(np.int32)
    index[0, 0] = -1
    sink = np.linspace(-1, 1, heads, dtype=np.float32)
    window, compressed = (poisoned(x, named(count, i)) for x, i in zip((window, compressed), index, strict=True))
    back = turns(batch, 1, 8)
    want = reference(q, window, index[0], compressed, index[1], None, sink, turned=back)
    check(kernel(q, window, index[0], shuffled(compressed, 16), index[1], None, sink, turned=back), want)


def test_gradients_are_those_of_the_reference():
    """To q, to entries that are not quantised, and to the sink."""
    entries = rows(1, 1, 8, 64, entry_format("bfloat16", 0))
    index, sink = jnp.array([[[3, -1, 5]]], jnp.int32), jnp.zeros(4)
    q = queries(0, 1, 1, 4, 64)

    def gradients(implementation):
        def loss(q, entries, sink):
            how = {"implementation": implementation, "scale": SCALE, "rotation": turns(1, 1, 8)}
            out, lse = sparse_attention(q, entries, index, None, None, None, sink, **how)
            return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(lse)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, entries, sink)

    with interpreted():
        got = jax.block_until_ready(gradients("sm90"))
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(gradients("reference")), strict=True):
        assert jnp.any(theirs != 0)
        assert disagreement(ours, theirs, relative=1e-2, elementwise=2.0**-6) is None


@pytest.mark.usefixtures("which")
def test_a_sink_of_nan_leaves_a_query_without_entries_at_zero():
    entries = rows(0, 1, 8)
    index = np.array([[[-1, -1]]], np.int32)
    out, lse = kernel(queries(1, 1, 1), entries, index, None, None, None, np.full(64, np.nan, np.float32))
    assert not np.any(out) and np.isneginf(lse).all()


def test_a_list_without_places_is_no_list():
    """Beside another; with none at all, the kernel refuses."""
    q, entries = queries(1, 1, 1), rows(0, 1, 8)
    index, none = np.array([[[2, 5]]], np.int32), np.zeros((1, 1, 0), np.int32)
    for window, compressed in ((index, none), (none, index)):
        args = q, entries, window, entries, compressed, None, SINK
        check(kernel(*args), reference(*args))
    out, lse = reference(q, entries, none, entries, none, None, SINK)
    assert not np.any(out) and np.isneginf(lse).all()
    assert "there are no entries" in reason(*shapes()[:2], none, shapes()[1], none, None, None)


def test_gradients_of_the_rotation_are_those_of_the_reference():
    q, entries, turned = queries(1, 1, 2), rows(0, 1, 8), turns(1, 2, 8)
    index = jnp.array([[[0, 3], [1, -1]]], jnp.int32)

    def loss(turned, implementation):
        how = {"implementation": implementation, "scale": SCALE, "rotation": turned}
        out, _ = sparse_attention(q, entries, index, None, None, None, None, **how)
        return jnp.sum(out.astype(jnp.float32) ** 3)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)

    with interpreted():
        got = jax.block_until_ready(gradient(turned, "sm90"))
    for ours, theirs in zip(got, gradient(turned, "reference"), strict=True):
        assert jnp.any(theirs != 0) and disagreement(ours, theirs, relative=1e-2, elementwise=2.0**-6) is None


def shapes(heads=64, width=FULL, dtype=jnp.bfloat16, form=FORM, tokens=1):
    """Arguments of the op that nobody computes with."""

    def build():
        entries = encode_rows(jnp.zeros((2, 8, width)), form)
        index = jnp.zeros((2, tokens, 4), jnp.int32)
        return jnp.zeros((2, tokens, heads, width), dtype), entries, index, None, None, None, None

    return jax.eval_shape(build)


def reason(*args):
    with pretend(KINDS["H100 / H200"]), pytest.raises(UnsupportedError) as error:
        api.DECODE.choose(args, {"scale": 1.0}, "sm90")
    return str(error.value)


def test_what_it_does_not_take():
    with pretend(KINDS["H100 / H200"]):
        assert api.DECODE.choose(shapes(heads=128, tokens=4), {"scale": 1.0})[0].name == "sm90"
    assert "640 channels" in reason(*shapes(width=640))
    assert "have 136 codes" in reason(*shapes(width=200))
    assert "float32: it takes bfloat16" in reason(*shapes(dtype=jnp.float32))
    assert "window entries are stored as" in reason(*shapes(form=entry_format("int8", 64)))
    assert "1 to 4 queries" in reason(*shapes(tokens=5))
    with pretend(KINDS["H100 / H200"]), pytest.raises(UnsupportedError, match="32 channels are turned, of which 16"):
        turned = jax.eval_shape(lambda: turns(2, 1, 16))
        args = shapes(width=64, form=entry_format("fp8", 16))
        api.DECODE.choose(args, {"scale": 1.0, "rotation": turned}, "sm90")
    q, entries, index, _, *rest = shapes()
    plain = shapes(form=entry_format("bfloat16", 0))[1]
    assert "in two formats" in reason(q, entries, index, plain, index, *rest[1:])
    rest = index, None, *rest
    assert "plain array" in reason(q, entries.body, *rest)


def test_a_named_kernel_is_refused_elsewhere():
    with pretend(KINDS["CPU"]), pytest.raises(UnsupportedError, match="CPU is no Hopper GPU"):
        api.DECODE.choose(shapes(), {"scale": 1.0}, "sm90")


@pytest.mark.parametrize("width", [128, 384, 512])
def test_divisions_have_work_for_every_thread_block(width):
    for units in (1, 2, 7, 33, 64, 128, 300):
        for blocks in (1, 2, 10, 130, 1000):
            parts, slices = divide(units, blocks, width, 132)
            assert 1 <= parts <= min(blocks, MOST) and width % (slices * 128) == 0
            assert slices == 1 or (parts > 1 and units * parts * slices <= 132)
    if width == FULL:  # as measured
        assert divide(1, 10, width, 132) == (10, 4) and divide(1, 130, width, 132) == (65, 2)
        assert divide(128, 10, width, 132) == (1, 1)
        assert takes_many(256, 10, 132) and not takes_many(256, 3, 132) and not takes_many(128, 10, 132)


def test_it_lowers_for_a_gpu_that_need_not_be_there():
    q, entries, index, *_ = shapes()
    pool = jax.ShapeDtypeStruct((16, page_bytes(FORM, FULL, 64)), jnp.uint8)
    table = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    count = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    pages = Pages(pool, table, FORM, FULL, 64)
    assert isinstance(entries, Rows)

    def run(q, window, window_index, compressed, compressed_index, count):
        named = (window, window_index, compressed, compressed_index, count)
        with pretend(KINDS["H100 / H200"]):
            return sparse_attention(q, *named, None, implementation="sm90", scale=SCALE)

    for args in ((entries, index, pages, index, count), (pages, index, pages, None, count)):
        jax.jit(run).trace(q, *args).lower(lowering_platforms=("cuda",))

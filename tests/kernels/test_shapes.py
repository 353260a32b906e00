"""Operands that do not fit are refused by name, whether or not annotations are checked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_matmul import block_diagonal_matmul, matmul
from pallas_kernels.grouped_matmul import experts
from pallas_kernels.hyper_connection import head
from pallas_kernels.index_scores import index_scores
from pallas_kernels.quant import FORMATS, FP8_BLOCK, FP8_GROUP
from pallas_kernels.quant.rows import empty_rows
from pallas_kernels.quantize_rows import rms_norm_quantize_rows
from pallas_kernels.router import router
from pallas_kernels.row_format import entry_format
from pallas_kernels.sparse_attention import sparse_attention_prefill
from pallas_kernels.sparse_attention.shapes import require_alike
from pallas_kernels.sparse_attention.sm90 import numbers_reason
from pallas_kernels.top_k import top_k
from tests.kernels.compiled import quantize

Q = jnp.zeros((2, 3, 4, 8))
ENTRIES = {"window": jnp.zeros((2, 5, 8)), "compressed": jnp.zeros((2, 6, 8))}
NAMED = {
    "window_index": jnp.zeros((2, 3, 5), jnp.int32),
    "compressed_index": None,
    "compressed_count": jnp.zeros((2, 3), jnp.int32),
}
ROUTED = {"k": 2, "scoring": "sigmoid", "normalize": True, "scale": 1.0}
ROWS = empty_rows(entry_format("fp8", 2), (2, 5, 8))
MISFITS = [
    ({"window": jnp.zeros((2, 5, 7))}, {}, None, "window entries have 7 channels, q has 8"),
    ({"compressed": jnp.zeros((1, 6, 8))}, {}, None, "compressed entries are of 1 sequences, q is of 2"),
    ({}, {"window_index": jnp.zeros((2, 1, 5), jnp.int32)}, None, r"window_index has shape \(2, 1, 5\)"),
    ({}, {"compressed_count": jnp.zeros((2,), jnp.int32)}, None, r"compressed_count has shape \(2,\)"),
    ({}, {"compressed_count": jnp.zeros((2, 3, 2), jnp.int32)}, None, r"compressed_count has shape \(2, 3, 2\)"),
    ({}, {"window_index": jnp.zeros((2, 3), jnp.int32)}, None, "and an axis of entries"),
    ({}, {"window_index": jnp.zeros((2, 3, 5))}, None, "float32: integers"),
    ({"window": dataclasses.replace(ROWS, tail=ROWS.tail.astype(jnp.float32))}, {}, None, "the tail is float32"),
    ({"window": dataclasses.replace(ROWS, body=ROWS.body[:, 1:])}, {}, None, r"the tail is bfloat16 \(2, 5, 2\); rows"),
    ({}, {"compressed_count": None}, None, "neither index nor count"),
    ({}, {}, jnp.zeros(3), "one value for each of q's 4 heads"),
]


def test_what_fits():
    require_alike(Q, ENTRIES, NAMED, jnp.zeros(4))
    require_alike(Q, ENTRIES | {"compressed": None}, NAMED | {"compressed_count": None}, None)


@pytest.mark.parametrize(("entries", "named", "sink", "reason"), MISFITS)
def test_attention(entries, named, sink, reason):
    with pytest.raises(ValueError, match=reason):
        require_alike(Q, ENTRIES | entries, NAMED | named, sink)


def unchecked(function):
    return getattr(function, "__wrapped__", function)


def test_router_and_products():
    x = jnp.zeros((3, 8))
    for rest, reason in (
        ((jnp.zeros((5, 9)), None, None), "x has 8 channels"),
        ((jnp.zeros((5, 8)), jnp.zeros(4), None), "there are 5 experts"),
        ((jnp.zeros((5, 8)), None, jnp.zeros((3, 1), jnp.int32)), "2 of each of 3 tokens"),
    ):
        with pytest.raises(ValueError, match=reason):
            unchecked(router)(x, *rest, **ROUTED)
    for w in (jnp.zeros((4, 9)), quantize(jnp.zeros((128, 256)), FP8_BLOCK)):
        with pytest.raises(ValueError, match="x has 8 channels, w takes"):
            unchecked(matmul)(x, w)


def test_groups_and_experts():
    for w, reason in ((jnp.zeros((4, 9)), "x has 8 channels"), (jnp.zeros((5, 8)), "5 rows for the 2 groups")):
        with pytest.raises(ValueError, match=reason):
            unchecked(block_diagonal_matmul)(jnp.zeros((3, 2, 8)), w)
    up, down = jnp.zeros((5, 6, 8)), jnp.zeros((5, 8, 6))
    for weights in ((up, up, up), (up, down, down), (down, down, up)):
        with pytest.raises(ValueError, match="they do not fit"):
            unchecked(experts)(jnp.zeros((3, 8)), *weights, None, limit=0.0)


def test_positions_of_sequences():
    band, start = jnp.zeros((2, 5, 8)), jnp.zeros((1,), jnp.int32)
    with pytest.raises(ValueError, match="one position for each of 2 sequences"):
        unchecked(sparse_attention_prefill)(Q, band, start, None, None, None, None, width=4, scale=1.0)


def test_numbers_of_other_types():
    assert numbers_reason(None, jnp.zeros(1, jnp.int32)) is None
    assert numbers_reason(jnp.zeros(1, jnp.int16), None) == "entries are numbered in int16: it takes int32"


def test_quantised_tensors_are_what_their_format_says():
    w = quantize(jnp.ones((128, 256)), FORMATS["fp8_row"])
    with pytest.raises(ValueError, match="w is not a .* tensor: scale has shape"):
        unchecked(matmul)(jnp.zeros((2, 256)), dataclasses.replace(w, scale=w.scale[:1]))
    codes = quantize(jnp.ones((2, 256)), FP8_GROUP)
    with pytest.raises(ValueError, match="codes is not a .* tensor"):
        unchecked(matmul)(jnp.zeros((2, 256)), w, codes=dataclasses.replace(codes, scale=codes.scale[:, :1]))
    of_experts = quantize(jnp.ones((3, 128, 128)), FORMATS["fp8_row"])
    routing = router(jnp.zeros((2, 128)), jnp.zeros((3, 128)), None, None, **ROUTED)
    bad = dataclasses.replace(of_experts, scale=of_experts.scale[:1])
    with pytest.raises(ValueError, match="w2 is not a .* tensor"):
        unchecked(experts)(jnp.zeros((2, 128)), of_experts, of_experts, bad, routing, limit=0.0)


def test_what_is_not_of_floats():
    integers = jnp.ones((2, 3, 4, 8), jnp.int32)
    with pytest.raises(TypeError, match="q is int32"):
        require_alike(integers, ENTRIES, NAMED, None)
    with pytest.raises(TypeError, match="weights is int32"):
        unchecked(index_scores)(Q, ENTRIES["window"], jnp.ones((2, 3, 4), jnp.int32))
    with pytest.raises(TypeError, match="scores is int32"):
        unchecked(top_k)(integers[0, 0], 1, jnp.ones(4, jnp.int32))
    with pytest.raises(TypeError, match="float"):
        unchecked(top_k)(Q[0, 0], 3.0, jnp.ones(4, jnp.int32))
    assert top_k(Q[0, 0], 3, jnp.full(4, 8)).shape == (4, 3)  # nothing is left of that
    routing = router(jnp.zeros((2, 8)), jnp.zeros((3, 8)), None, None, **ROUTED)
    with pytest.raises(TypeError, match="w1 is int8"):
        unchecked(experts)(jnp.zeros((2, 8)), *[jnp.ones((3, 8, 8), jnp.int8)] * 3, routing, limit=0.0)


def test_the_norm_of_quantised_rows():
    x = jnp.ones((2, 256), jnp.bfloat16)
    for weight in (jnp.ones(128), jnp.ones(1), jnp.ones((2, 1))):
        with pytest.raises(ValueError, match="weight has shape"):
            unchecked(rms_norm_quantize_rows)(x, weight, 1e-6)
    with pytest.raises(TypeError, match="eps is None"):
        unchecked(rms_norm_quantize_rows)(x, jnp.ones(256), None)


def test_an_expert_that_there_is_not_moves_no_other_token():
    x, weight, *w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((4, 8), (4, 8), *[(4, 8, 8)] * 3)))

    def layer(given):
        return experts(x, *w, router(x, weight, None, jnp.asarray(given, jnp.int32), **ROUTED), limit=0.0)

    usual = layer([[0, 1], [2, 3], [3, 1], [0, 2]])
    for given in (-1, 4, 99):
        got = layer([[0, 1], [2, 3], [given, 1], [0, 2]])
        np.testing.assert_array_equal(got[np.array([0, 1, 3])], usual[np.array([0, 1, 3])])


def test_nothing_at_all():
    mixed = head(jnp.zeros((0, 4, 8)), jnp.zeros((4, 32)), jnp.zeros(4), jnp.zeros(1), eps=1e-6, norm_eps=1e-6)
    assert mixed.shape == (0, 8)
    with pytest.raises(ValueError, match="the 0 groups of x"):
        unchecked(block_diagonal_matmul)(jnp.zeros((2, 0, 8)), jnp.zeros((4, 8)))
    with pytest.raises(ValueError, match="k is 0"):
        unchecked(router)(jnp.zeros((2, 8)), jnp.zeros((3, 8)), None, None, **(ROUTED | {"k": 0}))

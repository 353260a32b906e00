"""Operands that do not fit are refused by name, whether or not annotations are checked."""

import jax.numpy as jnp
import pytest

from pallas_kernels.block_matmul import block_diagonal_matmul, matmul
from pallas_kernels.grouped_matmul import experts
from pallas_kernels.quant import FP8_BLOCK
from pallas_kernels.router import router
from pallas_kernels.sparse_attention import sparse_attention_prefill
from pallas_kernels.sparse_attention.shapes import require_alike
from pallas_kernels.sparse_attention.sm90 import numbers_reason
from tests.kernels.compiled import quantize

Q = jnp.zeros((2, 3, 4, 8))
ENTRIES = {"window": jnp.zeros((2, 5, 8)), "compressed": jnp.zeros((2, 6, 8))}
NAMED = {
    "window_index": jnp.zeros((2, 3, 5), jnp.int32),
    "compressed_index": None,
    "compressed_count": jnp.zeros((2, 3), jnp.int32),
}
MISFITS = [
    ({"window": jnp.zeros((2, 5, 7))}, {}, None, "window entries have 7 channels, q has 8"),
    ({"compressed": jnp.zeros((1, 6, 8))}, {}, None, "compressed entries are of 1 sequences, q is of 2"),
    ({}, {"window_index": jnp.zeros((2, 1, 5), jnp.int32)}, None, r"window_index has shape \(2, 1, 5\)"),
    ({}, {"compressed_count": jnp.zeros((2,), jnp.int32)}, None, r"compressed_count has shape \(2,\)"),
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
    how = {"k": 2, "scoring": "sigmoid", "normalize": True, "scale": 1.0}
    x = jnp.zeros((3, 8))
    for rest, reason in (
        ((jnp.zeros((5, 9)), None, None), "x has 8 channels"),
        ((jnp.zeros((5, 8)), jnp.zeros(4), None), "there are 5 experts"),
        ((jnp.zeros((5, 8)), None, jnp.zeros((3, 1), jnp.int32)), "2 of each of 3 tokens"),
    ):
        with pytest.raises(ValueError, match=reason):
            unchecked(router)(x, *rest, **how)
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

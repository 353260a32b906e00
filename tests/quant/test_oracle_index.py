"""Hadamard rotation and FP4 index rows against recorded vectors: operands to the bit, scores, the selection."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.index_scores import index_scores
from pallas_kernels.quant import FormatError, as_cached, encode_rows
from pallas_kernels.quant import hadamard as rotation
from pallas_kernels.row_format import index_format
from pallas_kernels.top_k import top_k

hadamard, rotate_blocks = jax.jit(rotation.hadamard), jax.jit(rotation.rotate_blocks)
LARGEST_BLOCK = rotation.LARGEST_BLOCK
BF16 = ml_dtypes.bfloat16
FP4 = index_format("fp4")


def test_rotation_in_both_dtypes(vectors):
    x = vectors["had_x_bf16"].view(BF16)
    rotated = hadamard(x)
    np.testing.assert_array_equal(np.asarray(rotated).view(np.uint16), vectors["had_y_bf16"])
    wide = hadamard(x.astype(np.float32))
    np.testing.assert_allclose(wide, vectors["had_y"], rtol=0, atol=2e-6)


def test_rotation_is_its_own_inverse_and_keeps_products():
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=(3, 256)).astype(np.float32)) for _ in range(2))
    np.testing.assert_allclose(hadamard(hadamard(x)), x, atol=1e-5)
    np.testing.assert_allclose(np.asarray(hadamard(x)) @ np.asarray(hadamard(w)).T, x @ w.T, atol=1e-4)
    together, each = hadamard(np.stack([w, 2 * w])), hadamard(2 * w)
    np.testing.assert_array_equal(together[1], each, "a row's bits depend on no other")


@pytest.mark.parametrize("width, block", [(96, 32), (7, 1), (3 * LARGEST_BLOCK, LARGEST_BLOCK), (4096, LARGEST_BLOCK)])
def test_other_widths_are_rotated_in_blocks(width, block):
    x = jax.random.normal(jax.random.key(0), (2, width))
    want = np.concatenate([hadamard(x[:, at : at + block]) for at in range(0, width, block)], axis=1)
    np.testing.assert_allclose(rotate_blocks(x), want, atol=1e-5)


def test_rotation_refuses_other_widths_by_name():
    with pytest.raises(FormatError, match="96 channels.*power of two"):
        hadamard(jnp.zeros((2, 96)))


@pytest.mark.parametrize("name", ["idx_q", "idx_k"])
def test_rotated_and_rounded_operands(vectors, name):
    x = vectors[f"{name}_bf16"].view(BF16)
    cached = jax.jit(lambda x: as_cached(x, FP4))(x)
    np.testing.assert_array_equal(np.asarray(cached).view(np.uint16), vectors[f"{name}_rot_bf16"])


@pytest.mark.parametrize("stored", [False, True])
def test_scores_and_selection(vectors, stored):
    """Keys as they lie in the cache, and as simulated: the same scores."""
    q, keys = (vectors[f"{name}_bf16"].view(BF16)[None] for name in ("idx_q", "idx_k"))
    heads, width = q.shape[-2:]
    weights = vectors["idx_weights"][None] * np.float32(heads**-0.5 * width**-0.5)

    def score(q, keys, weights):
        return index_scores(as_cached(q, FP4), encode_rows(keys, FP4) if stored else as_cached(keys, FP4), weights)

    scores = jax.jit(score)(q, keys, weights)
    np.testing.assert_allclose(scores[0], vectors["idx_scores"], rtol=1e-5, atol=1e-5)
    best = top_k(scores, 8, jnp.full((1, q.shape[1]), keys.shape[1], jnp.int32))
    np.testing.assert_array_equal(np.sort(best[0], axis=-1), np.sort(vectors["idx_top8"], axis=-1))

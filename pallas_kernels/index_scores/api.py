"""Scores of every index key for every query: heads clipped at zero, then added by weight."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Op, kernel
from pallas_kernels.dispatch import reference as reference_candidate
from pallas_kernels.index_scores import reference, sm90
from pallas_kernels.operands import require_floats, require_plain_floats
from pallas_kernels.quant import Pages, Rows, outline
from pallas_kernels.typing import typed

INDEX_SCORES = Op(
    "index_scores",
    [kernel(sm90.index_scores, sm90.unsupported_reason), reference_candidate(reference.index_scores)],
)


def require_alike(
    q: jax.Array | Rows, keys: jax.Array | Rows | Pages, weights: jax.Array, counts: jax.Array | None
) -> None:
    """Raises ValueError, naming the operand, where it does not fit q: kernels read by address; TypeError where it is
    not of floats.
    """
    require_floats(weights=weights)
    require_plain_floats(q=q, keys=keys)
    if len(q.shape) != 4:
        raise ValueError(f"q has shape {q.shape}: [B, T, heads, width]")
    batch, tokens, heads, width = q.shape
    if isinstance(q, Rows):
        outline(q, "q")
    sequences, found = outline(keys, "keys")
    if sequences not in (None, batch) or found != width:
        raise ValueError(f"keys are of {sequences} sequences and {found} channels, q is of {batch} and {width}")
    if weights.shape != (batch, tokens, heads):
        raise ValueError(f"weights have shape {weights.shape}: one for each query and head, {(batch, tokens, heads)}")
    if counts is not None and counts.shape != (batch, tokens):
        raise ValueError(f"counts have shape {counts.shape}: one for each query, {(batch, tokens)}")


@typed
def index_scores(
    q: Float[Array, "B T Hi Ki"] | Rows,
    keys: Float[Array, "B C Ki"] | Rows | Pages,
    weights: Float[Array, "B T Hi"],
    counts: Int[Array, "B T"] | None = None,
    *,
    implementation: str = "auto",
) -> Float[Array, "B T C"]:
    """score[b, t, c] = sum over heads h of weights[b, t, h] * relu(q[b, t, h] . keys[b, c]), in float32.

    Queries come as the keys are stored, rotated where they are: `encode_rows`, or `as_cached`, whose values lie on the
    format's grid, so that quantising them again is exact. `weights` carry the width^-0.5 and heads^-0.5 factors.
    counts: how many leading keys each query wants, all by default. Scores of others are garbage, and a page behind
    those that some query wants is not read, nor is its place in the table: `top_k` takes the same counts. Raises
    ValueError where shapes do not fit.
    """
    require_alike(q, keys, weights, counts)
    return INDEX_SCORES(q, keys, weights, counts, implementation=implementation)

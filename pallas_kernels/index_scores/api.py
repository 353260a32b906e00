"""Scores of every index key for every query (SPEC section 2, indexer)."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.dispatch import Op
from pallas_kernels.dispatch import reference as reference_candidate
from pallas_kernels.index_scores import reference
from pallas_kernels.quant import Rows
from pallas_kernels.typing import typed

INDEX_SCORES = Op("index_scores", [reference_candidate(reference.index_scores)])


@typed
def index_scores(
    q: Float[Array, "B T Hi Ki"],
    keys: Float[Array, "B C Ki"] | Rows,
    weights: Float[Array, "B T Hi"],
    *,
    implementation: str = "auto",
) -> Float[Array, "B T C"]:
    """score[b, t, c] = sum over heads h of weights[b, t, h] * relu(q[b, t, h] . keys[b, c]), in float32.

    Queries come as the keys are stored, rotated where they are (`as_cached` of the keys' format). `weights` carry the
    width^-0.5 and heads^-0.5 factors. Scores of entries a query cannot see are garbage here: `top_k` takes the number
    of visible ones.
    """
    return INDEX_SCORES(q, keys, weights, implementation=implementation)

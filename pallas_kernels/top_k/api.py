"""Top-k with one tie-break everywhere: higher score first, then lower index."""

from __future__ import annotations

import operator

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Op, kernel
from pallas_kernels.dispatch import reference as reference_candidate
from pallas_kernels.operands import require_floats
from pallas_kernels.top_k import reference, sm90
from pallas_kernels.typing import typed

TOP_K = Op(
    "top_k",
    [kernel(sm90.top_k, sm90.unsupported_reason), reference_candidate(reference.top_k)],
)


@typed
def top_k(
    scores: Float[Array, "*rows C"],
    k: int,
    counts: Int[Array, "*rows"],
    *,
    implementation: str = "auto",
) -> Int[Array, "*rows k2"]:
    """Indices of the k best of the first `counts` scores of each row, best first; -1 where there are no more.

    Returns int32 [..., min(k, C)]. Ties go to the lower index; -0 equals +0; NaN, of either sign,
    comes before all numbers. Raises ValueError for counts of other rows, TypeError for scores that are no floats and a
    k that is no integer.
    """
    k = operator.index(k)
    require_floats(scores=scores)
    if counts.shape != scores.shape[:-1]:
        raise ValueError(f"counts have shape {counts.shape}: scores of shape {scores.shape} have one for each row")
    return TOP_K(scores, k, counts, implementation=implementation)

"""The matmul of the routed experts."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Op
from pallas_kernels.dispatch import reference as reference_candidate
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.quant import QuantTensor
from pallas_kernels.typing import typed

GROUPED_MATMUL = Op("grouped_matmul", [reference_candidate(reference.grouped_matmul)])


@typed
def grouped_matmul(
    x: Float[Array, "N I"],
    w: Float[Array, "E O I"] | QuantTensor,
    counts: Int[Array, " E"],
    *,
    implementation: str = "auto",
) -> Float[Array, "N O"]:
    """Row r of x times the transposed weight of its expert, accumulated in float32, in x's dtype.

    Rows are sorted by expert; `counts` (summing to N) says how many each expert has, zeros included.
    """
    return GROUPED_MATMUL(x, w, counts, implementation=implementation)

"""The matmuls of the routed experts: the two halves of an expert layer, and the bare product."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Op
from pallas_kernels.dispatch import reference as reference_candidate
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.quant import QuantTensor
from pallas_kernels.router import Routing
from pallas_kernels.typing import typed

GROUPED_MATMUL = Op("grouped_matmul", [reference_candidate(reference.grouped_matmul)])
GATE_UP = Op("expert_gate_up", [reference_candidate(reference.expert_gate_up)])
DOWN = Op("expert_down", [reference_candidate(reference.expert_down)])


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


@typed
def expert_gate_up(
    x: Float[Array, "N D"],
    w1: Float[Array, "E I D"] | QuantTensor,
    w3: Float[Array, "E I D"] | QuantTensor,
    routing: Routing,
    *,
    limit: float,
    implementation: str = "auto",
) -> Float[Array, "Nk I"]:
    """swiglu(x w1, x w3) times the routing weight, for every token's k experts; rows in `routing.order`.

    The routing weight multiplies here, before the second projection, so that a kernel can quantise its result.
    """
    return GATE_UP(x, w1, w3, routing, limit=limit, implementation=implementation)


@typed
def expert_down(
    hidden: Float[Array, "Nk I"],
    w2: Float[Array, "E D I"] | QuantTensor,
    routing: Routing,
    *,
    implementation: str = "auto",
) -> Float[Array, "N D"]:
    """The second projection of the rows of `expert_gate_up`, summed over each token's experts in float32."""
    return DOWN(hidden, w2, routing, implementation=implementation)

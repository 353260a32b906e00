"""The two halves of an expert layer. Between them a kernel may keep its rows in low precision."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.dispatch import Op
from pallas_kernels.dispatch import reference as reference_candidate
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.quant import QuantTensor
from pallas_kernels.router import Routing
from pallas_kernels.typing import typed

GATE_UP = Op("expert_gate_up", [reference_candidate(reference.expert_gate_up)])
DOWN = Op("expert_down", [reference_candidate(reference.expert_down)])


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

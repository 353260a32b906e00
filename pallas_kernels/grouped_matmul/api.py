"""The two halves of an expert layer. Between them a kernel may keep its rows in low precision."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.dispatch import Candidate, Op
from pallas_kernels.dispatch import reference as reference_candidate
from pallas_kernels.formats import QuantFormat
from pallas_kernels.grouped_matmul import reference, scaled_dot
from pallas_kernels.quant import ObservedWeight, QuantTensor, TreatedWeight
from pallas_kernels.quant.weights import shown
from pallas_kernels.router import Routing
from pallas_kernels.typing import typed

GATE_UP = Op(
    "expert_gate_up",
    [
        Candidate("scaled_dot", scaled_dot.expert_gate_up, scaled_dot.gate_up_unsupported_reason),
        reference_candidate(reference.expert_gate_up),
    ],
)
DOWN = Op(
    "expert_down",
    [
        Candidate("scaled_dot", scaled_dot.expert_down, scaled_dot.down_unsupported_reason),
        reference_candidate(reference.expert_down),
    ],
)


@typed
def expert_gate_up(
    x: Float[Array, "N D"],
    w1: Float[Array, "E I D"] | QuantTensor | TreatedWeight | ObservedWeight,
    w3: Float[Array, "E I D"] | QuantTensor | TreatedWeight | ObservedWeight,
    routing: Routing,
    *,
    limit: float,
    activations: QuantFormat | None = None,
    implementation: str = "auto",
) -> Float[Array, "Nk I"]:
    """swiglu(x w1, x w3) times the routing weight, for every token's k experts; rows in `routing.order`.

    The routing weight multiplies here, before the second projection, so that a kernel can quantise its result.
    activations: as in `matmul`.
    """
    return GATE_UP(
        x, shown(x, w1), shown(x, w3), routing, limit=limit, activations=activations, implementation=implementation
    )


@typed
def expert_down(
    hidden: Float[Array, "Nk I"],
    w2: Float[Array, "E D I"] | QuantTensor | TreatedWeight | ObservedWeight,
    routing: Routing,
    *,
    activations: QuantFormat | None = None,
    implementation: str = "auto",
) -> Float[Array, "N D"]:
    """The second projection of the rows of `expert_gate_up`, summed over each token's experts in float32."""
    return DOWN(hidden, shown(hidden, w2), routing, activations=activations, implementation=implementation)

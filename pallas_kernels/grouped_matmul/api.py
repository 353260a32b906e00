"""A layer of experts as one op, so that a kernel may lay out its rows as it likes and keep them in low precision."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.dispatch import Candidate, Op, kernel
from pallas_kernels.dispatch import reference as reference_candidate
from pallas_kernels.formats import QuantFormat
from pallas_kernels.grouped_matmul import scaled_dot, sm90
from pallas_kernels.grouped_matmul.gradient import rounded_reference
from pallas_kernels.operands import require_floats, require_plain_floats
from pallas_kernels.quant import ObservedWeight, QuantTensor, TreatedWeight
from pallas_kernels.quant.weights import require_quantised, require_rows_apart, shown
from pallas_kernels.router import Routing
from pallas_kernels.swiglu import require_limit
from pallas_kernels.typing import typed

EXPERTS = Op(
    "experts",
    [
        kernel(sm90.experts, sm90.unsupported_reason),
        Candidate("scaled_dot", scaled_dot.experts, scaled_dot.unsupported_reason),
        reference_candidate(rounded_reference),
    ],
)


@typed
def experts(
    x: Float[Array, "N D"],
    w1: Float[Array, "E I D"] | QuantTensor | TreatedWeight | ObservedWeight,
    w3: Float[Array, "E I D"] | QuantTensor | TreatedWeight | ObservedWeight,
    w2: Float[Array, "E D I"] | QuantTensor | TreatedWeight | ObservedWeight,
    routing: Routing,
    *,
    limit: float,
    activations: QuantFormat | None = None,
    batch_invariant: bool = False,
    implementation: str = "auto",
) -> Float[Array, "N D"]:
    """Every token's sum of w2 (routing weight * swiglu(w1 x, w3 x)) over its k experts, added in float32, in x's dtype.

    The routing weight multiplies before the second projection, so that a kernel can quantise its result. limit: of the
    SwiGLU clamp, 0 for none. activations: as in `matmul`, of the inputs of all three weights. batch_invariant: the bits
    of a token depend neither on the others nor on their number; implementations that cannot promise it refuse. Raises
    TypeError for an x or plain weights that are no floats, ValueError where shapes do not fit, for quantised weights
    that are not what their format says, for a limit below 0, and in that mode for activations whose scales span rows.
    """
    require_limit(limit)
    require_floats(x=x)
    require_plain_floats(w1=w1, w3=w3, w2=w2)
    require_quantised(w1=w1, w3=w3, w2=w2)
    if x.ndim != 2 or len(w1.shape) != 3:
        raise ValueError(f"x and w1 have shapes {x.shape} and {tuple(w1.shape)}: [N, D] and [E, I, D]")
    count, inner, channels = w1.shape
    if x.shape[-1] != channels or tuple(w3.shape) != tuple(w1.shape) or tuple(w2.shape) != (count, channels, inner):
        shapes = ", ".join(str(tuple(each.shape)) for each in (x, w1, w3, w2))
        raise ValueError(f"x, w1, w3 and w2 have shapes {shapes}: they do not fit [N, D], [E, I, D] twice, [E, D, I]")
    _require_routing(routing, x.shape[0], count)
    if batch_invariant:
        for w in (w1, w3, w2):
            require_rows_apart(w, activations)
    # What w2 sees exists only within the layer: the reference shows it.
    w1, w3 = shown(x, w1), shown(x, w3)
    how: dict[str, Any] = {"limit": limit, "activations": activations, "batch_invariant": batch_invariant}
    return EXPERTS(x, w1, w3, w2, routing, **how, implementation=implementation)


def _require_routing(routing: Routing, tokens: int, experts: int) -> None:
    """That rows are gathered and counted within bounds: XLA clamps an index beyond them and says nothing."""
    k = routing.experts.shape[-1]
    fitting = {"experts": (tokens, k), "weights": (tokens, k), "counts": (experts,), "order": (tokens * k,)}
    for name, shape in fitting.items():
        if (found := tuple(getattr(routing, name).shape)) != shape:
            raise ValueError(
                f"routing.{name} has shape {found}, not {shape}: there are {tokens} tokens, {k} choices each, "
                f"and {experts} experts"
            )

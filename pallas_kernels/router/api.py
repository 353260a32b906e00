"""Which experts each token takes, with which weights, and the row order the expert matmul needs."""

from __future__ import annotations

import operator

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Op, kernel
from pallas_kernels.dispatch import reference as reference_candidate
from pallas_kernels.router import reference, sm90
from pallas_kernels.router.reference import Routing
from pallas_kernels.typing import typed

ROUTER = Op("router", [kernel(sm90.router, sm90.unsupported_reason), reference_candidate(reference.router)])


@typed
def router(
    x: Float[Array, "N D"],
    weight: Float[Array, "E D"],
    bias: Float[Array, " E"] | None,
    experts: Int[Array, "N k"] | None,
    *,
    k: int,
    scoring: str,
    normalize: bool,
    scale: float,
    implementation: str = "auto",
) -> Routing:
    """Routes N tokens, all in float32.

    scoring: sqrtsoftplus, sigmoid or softmax of x @ weight.T. bias: added for the choice only, not to the weights.
    experts: given (hash routing), of 0 to E - 1, where others count as the nearest of these; or None (the k best by
    score + bias; ties to the lower expert).
    normalize: divide the chosen scores by their sum; as in the released code it does nothing with softmax, whose
    weights stay shares of all experts. scale: multiplies the weights at the end.
    On Hopper the number of tokens decides which kernel runs (one up to 128, another beyond) and in how many parts it
    adds a score's products: the last bits of a token's scores and weights, and so those of its logits, may depend on
    how many tokens come with it, as may the choice between experts that are equally good but for such bits.
    Raises ValueError where shapes do not fit.
    """
    k = operator.index(k)
    for name, array in (("x", x), ("weight", weight)):
        if array.ndim != 2:
            raise ValueError(f"{name} has shape {array.shape}: a matrix, [N, D] and [E, D]")
    if k < 1:
        raise ValueError(f"k is {k}: each token takes one expert or more")
    if weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight has shape {weight.shape}: x has {x.shape[1]} channels")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {bias.shape}: there are {weight.shape[0]} experts")
    if experts is not None and experts.shape != (x.shape[0], k):
        raise ValueError(f"experts have shape {experts.shape}: {k} of each of {x.shape[0]} tokens")
    if experts is None and k > weight.shape[0]:
        raise ValueError(f"k is {k}: there are {weight.shape[0]} experts")
    if experts is not None:  # places in memory are made of them, and rows are gathered and counted by them
        experts = jnp.clip(experts, 0, weight.shape[0] - 1)
    return ROUTER(
        x, weight, bias, experts, k=k, scoring=scoring, normalize=normalize, scale=scale, implementation=implementation
    )

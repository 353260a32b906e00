"""The Hopper kernels as an implementation of `router`: which calls it takes, and its gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import device
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.router import reference
from pallas_kernels.router.reference import Routing
from pallas_kernels.router.tiling import FEW, LANES, MOST_CHOSEN, MOST_EXPERTS, STEP, padded_experts
from pallas_kernels.straight_through import straight_through

SCORINGS = ("sqrtsoftplus", "sigmoid", "softmax")


def unsupported_reason(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    experts: jax.Array | None,
    *,
    k: int,
    scoring: str,
    normalize: bool,
    scale: float,
) -> str | None:
    """Why the Hopper kernel does not take this call, None if it does."""
    del bias, normalize, scale
    here, (tokens, columns), count = device.current(), x.shape, weight.shape[0]
    if here.capability != (9, 0) and not is_interpreted():
        return f"{here.name} is no Hopper GPU (compute capability 9.0)"
    if scoring not in SCORINGS:
        return f"scoring is {scoring!r}: it takes {', '.join(SCORINGS)}"
    if x.dtype != jnp.bfloat16:
        return f"x is {x.dtype}: it takes bfloat16, which products with bfloat16 terms keep exact"
    if weight.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the matrix is {weight.dtype}: it takes float32 and bfloat16"
    if tokens < 1:
        return "there are no tokens: it takes one and more"
    if not 1 <= k <= MOST_CHOSEN:
        return f"a token takes {k} experts: it takes 1 to {MOST_CHOSEN}"
    if not k <= count <= MOST_EXPERTS:
        return f"there are {count} experts: it takes at least the {k} that a token takes, up to {MOST_EXPERTS}"
    if scoring == "softmax" and count != padded_experts(count):
        return f"softmax over {count} experts: it takes multiples of {LANES}, for others are filled up to one"
    if columns == 0 or columns % STEP:
        return f"a matrix of {(count, columns)}: it takes multiples of {STEP} columns"
    if experts is not None and experts.dtype != jnp.int32:
        return f"the given experts are {experts.dtype}: it takes int32"
    return None


def router(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    experts: jax.Array | None,
    *,
    k: int,
    scoring: str,
    normalize: bool,
    scale: float,
) -> Routing:
    """`reference.router`, whose gradient it has too."""
    from pallas_kernels.router import kernel_sm90, many_sm90  # here: who runs no kernel does not wait for Pallas

    rules = kernel_sm90.Rules(k, scoring, normalize, scale)
    run = (kernel_sm90 if len(x) <= FEW else many_sm90).router
    found = run(*jax.lax.stop_gradient((x, weight, bias)), experts, rules)

    def smooth(inputs: Any, constants: Any) -> Any:
        """Of the same choice: where two experts are nearly as good, another sum may have the other."""
        x, weight = inputs
        return reference.router(x, weight, None, constants.experts, **rules._asdict())

    return straight_through(lambda _, found: found, smooth)((x, weight), found)  # pyright: ignore[reportReturnType]

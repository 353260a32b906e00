"""The gradient of an expert layer that rounds: to its tokens and routing weights, that of the reference without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.grouped_matmul import reference
from pallas_kernels.router import Routing
from pallas_kernels.straight_through import straight_through

# Why a layer with a gradient of its own is refused: what is shown within it must not leave it.
OBSERVED = "the input of w2 is observed"


def with_gradient(
    run: Callable[..., jax.Array], x: jax.Array, w1: Any, w3: Any, w2: Any, routing: Routing, *, limit: float
) -> jax.Array:
    """`run(x, w1, w3, w2, routing, limit=limit)`; weights get no gradient."""

    def of(layer: Callable[..., jax.Array]) -> Callable[[Any, Any], jax.Array]:
        def call(inputs: tuple[jax.Array, jax.Array], constants: tuple[Any, Any, Any, Routing]) -> jax.Array:
            (x, factors), (*weights, rest) = inputs, constants
            return layer(x, *weights, rest._replace(weights=factors), limit=limit)

        return call

    fixed: Any = routing._replace(weights=None)
    return straight_through(of(run), of(reference.experts))((x, routing.weights), (w1, w3, w2, fixed))

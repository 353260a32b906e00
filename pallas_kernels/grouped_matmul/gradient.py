"""The gradient of an expert layer that rounds: to its tokens and routing weights, that of the reference without it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.formats import QuantFormat
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.products import stored
from pallas_kernels.quant import QuantTensor
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


def rounded_reference(
    *operands: Any, limit: float, activations: QuantFormat | None = None, batch_invariant: bool = False
) -> jax.Array:
    """`reference.experts`, with the gradient that the kernels have where all three products round their input.

    operands: x, w1, w3, w2 and the routing. A weight that is not quantised needs a gradient of its own, and what is
    shown of w2 must not leave the layer: there gradients pass each rounding straight through.
    """
    run = functools.partial(reference.experts, activations=activations, batch_invariant=batch_invariant)
    if activations is None or not all(isinstance(stored(w), QuantTensor) for w in operands[1:4]):
        return run(*operands, limit=limit)
    return with_gradient(run, *operands, limit=limit)

"""The experts of a layer: one shared, which sees every token, and the routed ones."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from dsv4.model.layers import Linear, declare, read
from dsv4.parameters import SpecTree
from pallas_kernels.formats import QuantFormat
from pallas_kernels.grouped_matmul import experts
from pallas_kernels.router import Routing
from pallas_kernels.swiglu import swiglu


class SharedExpert(nnx.Module):
    """Sees every token, un-weighted; clamped like the routed ones."""

    def __init__(self, specs: SpecTree, limit: float):
        self.w1, self.w3, self.w2 = Linear(specs["w1"]), Linear(specs["w3"]), Linear(specs["w2"])
        self.limit = limit

    def __call__(self, x: jax.Array, activations: QuantFormat | None, implementation: str) -> jax.Array:
        def project(linear: Linear, x: jax.Array) -> jax.Array:
            return linear(x, activations=activations, implementation=implementation)

        hidden = swiglu(project(self.w1, x), project(self.w3, x), self.limit)
        return project(self.w2, hidden.astype(x.dtype))


class Stack(nnx.Module):
    """One matrix of every expert, [E, out, in]."""

    def __init__(self, specs: SpecTree):
        self.weight = declare(specs["weight"])


class RoutedExperts(nnx.Module):
    def __init__(self, specs: SpecTree, limit: float):
        self.w1, self.w3, self.w2 = Stack(specs["w1"]), Stack(specs["w3"]), Stack(specs["w2"])
        self.limit = limit

    def __call__(
        self, x: jax.Array, routing: Routing, activations: QuantFormat | None, implementation: str
    ) -> jax.Array:
        """Sum over its experts of weight * expert(token), for tokens x [N, D]."""
        w1, w3, w2 = (read(stack.weight) for stack in (self.w1, self.w3, self.w2))
        how: Any = {"activations": activations, "implementation": implementation}
        return experts(x, w1, w3, w2, routing, limit=self.limit, **how)

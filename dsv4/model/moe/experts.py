"""The experts of a layer: one shared, which sees every token, and the routed ones."""

from __future__ import annotations

import jax
from flax import nnx

from dsv4.model.layers import Linear, declare, read
from dsv4.parameters import SpecTree
from pallas_kernels.grouped_matmul import expert_down, expert_gate_up
from pallas_kernels.router import Routing
from pallas_kernels.swiglu import swiglu


class SharedExpert(nnx.Module):
    """Sees every token, un-weighted; clamped like the routed ones."""

    def __init__(self, specs: SpecTree, limit: float):
        self.w1, self.w3, self.w2 = Linear(specs["w1"]), Linear(specs["w3"]), Linear(specs["w2"])
        self.limit = limit

    def __call__(self, x: jax.Array, implementation: str) -> jax.Array:
        hidden = swiglu(
            self.w1(x, implementation=implementation), self.w3(x, implementation=implementation), self.limit
        )
        return self.w2(hidden.astype(x.dtype), implementation=implementation)


class Stack(nnx.Module):
    """One matrix of every expert, [E, out, in]."""

    def __init__(self, specs: SpecTree):
        self.weight = declare(specs["weight"])


class RoutedExperts(nnx.Module):
    def __init__(self, specs: SpecTree, limit: float):
        self.w1, self.w3, self.w2 = Stack(specs["w1"]), Stack(specs["w3"]), Stack(specs["w2"])
        self.limit = limit

    def __call__(self, x: jax.Array, routing: Routing, implementation: str) -> jax.Array:
        """Sum over its experts of weight * expert(token), for tokens x [N, D]."""
        hidden = expert_gate_up(
            x, read(self.w1.weight), read(self.w3.weight), routing, limit=self.limit, implementation=implementation
        )
        return expert_down(hidden, read(self.w2.weight), routing, implementation=implementation)

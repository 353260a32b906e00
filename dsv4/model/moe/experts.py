"""The experts of a layer: one shared, which sees every token, and the routed ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from dsv4.model.layers import Linear, declare, read
from dsv4.parameters import SpecTree
from pallas_kernels.grouped_matmul import experts
from pallas_kernels.quant import QuantTensor
from pallas_kernels.router import Routing
from pallas_kernels.swiglu import swiglu


class SharedExpert(nnx.Module):
    """Sees every token, un-weighted; clamped like the routed ones."""

    def __init__(self, specs: SpecTree, limit: float):
        self.w1, self.w3, self.w2 = Linear(specs["w1"]), Linear(specs["w3"]), Linear(specs["w2"])
        self.limit = limit

    def __call__(self, x: jax.Array, products: Mapping[str, Any], codes: QuantTensor | None = None) -> jax.Array:
        """products: keywords of a matmul. codes: x rounded, where that is known."""
        gate, up = (w(x, codes=codes, **products) for w in (self.w1, self.w3))
        hidden = swiglu(gate, up, self.limit)
        return self.w2(hidden.astype(x.dtype), **products)


class Stack(nnx.Module):
    """One matrix of every expert, [E, out, in]."""

    def __init__(self, specs: SpecTree):
        self.weight = declare(specs["weight"])


class RoutedExperts(nnx.Module):
    def __init__(self, specs: SpecTree, limit: float):
        self.w1, self.w3, self.w2 = Stack(specs["w1"]), Stack(specs["w3"]), Stack(specs["w2"])
        self.limit = limit

    def __call__(self, x: jax.Array, routing: Routing, products: Mapping[str, Any]) -> jax.Array:
        """Sum over its experts of weight * expert(token), for tokens x [N, D]. products: keywords of `experts`."""
        w1, w3, w2 = (read(stack.weight) for stack in (self.w1, self.w3, self.w2))
        return experts(x, w1, w3, w2, routing, limit=self.limit, **products)

"""Expert maths: the clamped SwiGLU, for one shared expert and for rows sorted by routed expert."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4.model.layers import Linear, declare, read
from dsv4.parameters import SpecTree
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.router import Routing


def swiglu(gate: jax.Array, up: jax.Array, limit: float) -> jax.Array:
    """silu(min(gate, limit)) * clip(up, -limit, limit) in float32; limit 0 clamps nothing."""
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    if limit:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return jax.nn.silu(gate) * up


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
        tokens, k = routing.experts.shape

        def experts(rows: jax.Array, stack: Stack) -> jax.Array:
            return grouped_matmul(rows, read(stack.weight), routing.counts, implementation=implementation)

        rows = x[routing.order // k]
        hidden = swiglu(experts(rows, self.w1), experts(rows, self.w3), self.limit)
        hidden = hidden * routing.weights.reshape(-1)[routing.order][:, None]  # weights multiply before W2
        out = experts(hidden.astype(x.dtype), self.w2)
        # Back to token order by a gather: a scatter-add would sum in an order that depends on the other tokens.
        place = jnp.zeros_like(routing.order).at[routing.order].set(jnp.arange(tokens * k, dtype=jnp.int32))
        return jnp.sum(out[place].reshape(tokens, k, -1).astype(jnp.float32), axis=1).astype(x.dtype)

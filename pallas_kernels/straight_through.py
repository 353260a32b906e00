"""Gradients of products that round what they multiply.

Rounding has no useful derivative, and a kernel none at all: the input gets the gradient of the same product with
unrounded inputs (the straight-through estimate), computed as the reference would; codes and scales get none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def straight_through(
    run: Callable[[Any, Any], jax.Array], smooth: Callable[[Any, Any], jax.Array]
) -> Callable[[Any, Any], jax.Array]:
    """`run(inputs, constants)` that differentiates as `smooth(inputs, constants)` does, to `inputs` alone.

    Both are pytrees of arrays; both functions give an array of the same shape and dtype.
    """

    @jax.custom_vjp
    def call(inputs: Any, constants: Any) -> jax.Array:
        return run(inputs, constants)

    def forward(inputs: Any, constants: Any) -> tuple[jax.Array, tuple[Any, Any]]:
        return run(inputs, constants), (inputs, constants)

    def backward(saved: tuple[Any, Any], gradient: jax.Array) -> tuple[Any, Any]:
        inputs, constants = saved
        _, pull = jax.vjp(lambda inputs: smooth(inputs, constants), inputs)
        return *pull(gradient), jax.tree.map(_no_gradient, constants)

    call.defvjp(forward, backward)
    return call


def _no_gradient(leaf: Any) -> Any:
    """Zero, of the type that jax asks for: float0 for integers."""
    return jnp.zeros_like(leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else np.zeros(leaf.shape, jax.dtypes.float0)

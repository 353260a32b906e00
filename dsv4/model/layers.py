"""The two smallest modules, and how a Spec becomes a Flax parameter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dsv4.parameters import FLOAT32_CLASSES, Spec, SpecTree
from pallas_kernels.block_matmul import matmul
from pallas_kernels.formats import QuantFormat
from pallas_kernels.norm import rms_norm
from pallas_kernels.quant import QuantTensor


class Buffer(nnx.Variable):
    """A value of the model that no gradient moves: router bias and hash tables."""


def declare(spec: Spec, dtype: DTypeLike = jnp.float32) -> nnx.Variable:
    """An abstract parameter (nothing is allocated) that carries its Spec; `nnx.merge` fills in the array."""
    if spec.kind == "hash":
        dtype = jnp.int32
    elif spec.kind in FLOAT32_CLASSES:
        dtype = jnp.float32
    value = jax.ShapeDtypeStruct(spec.shape, dtype)
    return (nnx.Param if spec.trainable else Buffer)(value, spec=spec)


def read(variable: nnx.Variable) -> Any:
    """The array, or the QuantTensor, that a parameter holds."""
    return variable.get_value()


class Linear(nnx.Module):
    """x @ weight.T with weight [out, in], plain or quantised; keywords are those of `matmul`."""

    def __init__(self, specs: SpecTree):
        self.weight = declare(specs["weight"])

    def __call__(
        self,
        x: jax.Array,
        *,
        activations: QuantFormat | None = None,
        codes: QuantTensor | None = None,
        out_dtype: DTypeLike | None = None,
        batch_invariant: bool = False,
        implementation: str = "auto",
    ) -> jax.Array:
        how: dict[str, Any] = {"batch_invariant": batch_invariant, "implementation": implementation}
        return matmul(x, read(self.weight), activations=activations, codes=codes, out_dtype=out_dtype, **how)


class RMSNorm(nnx.Module):
    def __init__(self, specs: SpecTree, eps: float):
        self.weight = declare(specs["weight"])
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, read(self.weight), self.eps)

"""The matmul every dense projection goes through."""

from __future__ import annotations

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.block_matmul import reference
from pallas_kernels.dispatch import Op
from pallas_kernels.dispatch import reference as reference_candidate
from pallas_kernels.quant import QuantTensor
from pallas_kernels.typing import typed

MATMUL = Op("block_matmul", [reference_candidate(reference.matmul)])
BLOCK_DIAGONAL = Op("block_diagonal_matmul", [reference_candidate(reference.block_diagonal_matmul)])


@typed
def matmul(
    x: Float[Array, "*rows I"],
    w: Float[Array, "O I"] | QuantTensor,
    *,
    out_dtype: DTypeLike | None = None,
    implementation: str = "auto",
) -> Float[Array, "*rows O"]:
    """x @ w.T, accumulated in float32, in `out_dtype` (default: x's). A quantised w is dequantised per call."""
    return MATMUL(x, w, out_dtype=out_dtype, implementation=implementation)


@typed
def block_diagonal_matmul(
    x: Float[Array, "*rows G I"],
    w: Float[Array, "GO I"] | QuantTensor,
    *,
    implementation: str = "auto",
) -> Float[Array, "*rows GO"]:
    """Group g of x times rows g*O..(g+1)*O-1 of w, concatenated: the grouped output projection `wo_a`."""
    return BLOCK_DIAGONAL(x, w, implementation=implementation)

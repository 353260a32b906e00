"""The matmul every dense projection goes through."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.block_matmul import block_dot, reference, scaled_dot, sm90
from pallas_kernels.dispatch import Candidate, Op, kernel
from pallas_kernels.dispatch import reference as reference_candidate
from pallas_kernels.formats import QuantFormat
from pallas_kernels.operands import require_floats
from pallas_kernels.quant import ObservedWeight, QuantTensor, TreatedWeight
from pallas_kernels.quant.weights import require_quantised, require_rows_apart, shown
from pallas_kernels.typing import typed

MATMUL = Op(
    "block_matmul",
    [
        kernel(sm90.matmul, sm90.unsupported_reason),
        Candidate("scaled_dot", scaled_dot.matmul, scaled_dot.unsupported_reason),
        Candidate("block_dot", block_dot.matmul, block_dot.unsupported_reason),
        reference_candidate(reference.matmul),
    ],
)
BLOCK_DIAGONAL = Op(
    "block_diagonal_matmul",
    [
        kernel(sm90.block_diagonal_matmul, sm90.block_diagonal_unsupported_reason),
        reference_candidate(reference.block_diagonal_matmul),
    ],
)


@typed
def matmul(
    x: Float[Array, "*rows I"],
    w: Float[Array, "O I"] | QuantTensor | TreatedWeight | ObservedWeight,
    *,
    activations: QuantFormat | None = None,
    codes: QuantTensor | None = None,
    out_dtype: DTypeLike | None = None,
    batch_invariant: bool = False,
    implementation: str = "auto",
) -> Float[Array, "*rows O"]:
    """x @ w.T, accumulated in float32, in `out_dtype` (default: x's). A quantised w is dequantised per call.

    activations: the format x is rounded to where w is quantised, None to leave it; tiles of one row. Where x has
    fewer channels than a tile, a tile is the whole row. codes: `quantize(x)`, [rows, I], where it is known already: it
    is not made again if its format is `activations`, and changes nothing. batch_invariant: the bits of a row depend on
    it and on w alone, neither on the other rows nor on their number; implementations that cannot promise it refuse.
    Raises TypeError for an x or w that is no array of floats (w may be quantised), ValueError where x, w and codes do
    not fit, and in that mode for activations whose scales span rows.
    """
    _require_alike(x, w, least=1)
    x = jnp.asarray(x)
    require_quantised(w=w, codes=codes)
    if codes is not None and codes.shape != (rows := (math.prod(x.shape[:-1]), x.shape[-1])):
        raise ValueError(f"codes have shape {codes.shape}: the rows of x {x.shape} are {rows}")
    if batch_invariant:
        require_rows_apart(w, activations)
    how: dict[str, Any] = {"activations": activations, "out_dtype": out_dtype, "batch_invariant": batch_invariant}
    return MATMUL(x, shown(x, w), codes=codes, **how, implementation=implementation)


def _require_alike(x: jax.Array, w: Any, least: int) -> None:
    """least: axes of x."""
    require_floats(x=x)
    if not isinstance(w, QuantTensor | TreatedWeight | ObservedWeight):
        require_floats(w=w)
    if x.ndim < least:
        raise ValueError(f"x has shape {x.shape}: it ends in {'[G, I]' if least == 2 else '[I]'}")
    if w.ndim != 2:
        raise ValueError(f"w has shape {tuple(w.shape)}: a matrix [O, I]")
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(f"x has {x.shape[-1]} channels, w takes {w.shape[-1]}: shapes {x.shape} and {tuple(w.shape)}")


@typed
def block_diagonal_matmul(
    x: Float[Array, "*rows G I"],
    w: Float[Array, "GO I"] | QuantTensor | TreatedWeight | ObservedWeight,
    *,
    batch_invariant: bool = False,
    implementation: str = "auto",
) -> Float[Array, "*rows GO"]:
    """Group g of x times rows g*O..(g+1)*O-1 of w, concatenated: the grouped output projection `wo_a`.

    Its input is never quantised, in the released code and here. batch_invariant, and errors: as in `matmul`.
    """
    _require_alike(x, w, least=2)
    x = jnp.asarray(x)
    require_quantised(w=w)
    if x.shape[-2] == 0 or w.shape[0] % x.shape[-2]:
        raise ValueError(f"w has {w.shape[0]} rows for the {x.shape[-2]} groups of x: a multiple")
    return BLOCK_DIAGONAL(x, shown(x, w), batch_invariant=batch_invariant, implementation=implementation)

"""The weight-only Hopper kernel: which weights it takes beside bfloat16 rows, padding, and its tiling."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.block_matmul import tilings
from pallas_kernels.block_matmul.problem import BLOCK, Problem
from pallas_kernels.block_matmul.weight_only_tiling import WeightOnly
from pallas_kernels.mosaic.scales import scale_bytes
from pallas_kernels.products import FLOAT8, stored
from pallas_kernels.quant.tensor import QuantTensor

ONCE = ((1, None), (None, None))  # tiles whose scales do not vary along K: they multiply finished sums


def operands_reason(x: jax.Array, w: Any) -> str | None:
    """Why rows x that stay unrounded and the weight are not what the kernel multiplies."""
    weight = stored(w)
    if not isinstance(weight, QuantTensor):
        return "the weight is not quantised"
    form = weight.format
    if form.element not in FLOAT8 or form.tile not in ((BLOCK, BLOCK), *ONCE):
        return f"weights are {form.name}: it takes e4m3 or e5m2, scales of 128 x 128 blocks, rows or the whole"
    if form.tile not in ONCE and form.scale == "bfloat16":
        return "scales of blocks are bfloat16: it takes ue8m0 and float32"
    if x.dtype != jnp.bfloat16:
        return f"activations are {x.dtype} and not quantised: by unrounded ones it takes bfloat16"
    return None


def tiling(m: int, w: QuantTensor, out_dtype: DTypeLike, groups: int = 1, **how: Any) -> WeightOnly | None:
    """Of m rows and `groups` weights, one above the other in w [groups x n, k]. how: of tilings.weight_only_tiling."""
    n, k = w.shape
    if n % groups:
        return None
    by_block = w.format.tile not in ONCE and w.format.scale == "float32"
    problem = Problem(m * groups, n // groups, k, experts=groups)
    return tilings.weight_only_tiling(problem, by_block=by_block, out_bytes=jnp.dtype(out_dtype).itemsize, **how)


def product(x: jax.Array, w: QuantTensor, out_dtype: DTypeLike, groups: int = 1, **how: Any) -> jax.Array:
    """[m, n] of x [m, groups x k] and w [n, k]: n / groups rows of w see one group of columns each."""
    from pallas_kernels.block_matmul import weight_only_sm90  # Pallas is slow to import

    m = x.shape[0]
    chosen = tiling(m, w, out_dtype, groups, **how)
    assert chosen is not None, "unsupported_reason refuses what no tiling fits"
    if w.format.tile in ONCE:
        scale = jnp.broadcast_to(w.scale.astype(jnp.float32)[:, 0], (w.shape[0],))
    else:
        scale = scale_bytes(w.scale)
    x = jnp.pad(x, ((0, -m % chosen.tokens), (0, 0)))
    return weight_only_sm90.matmul(x, w.values, scale, chosen, out_dtype)[:m]

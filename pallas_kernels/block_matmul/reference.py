"""The definition: dequantise, multiply, accumulate in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.formats import QuantFormat
from pallas_kernels.products import dequantized_after
from pallas_kernels.quant.tensor import QuantTensor
from pallas_kernels.quant.weights import TreatedWeight, treat

ROWS = 64  # of a product where a row's bits are not to depend on the others


def matmul(
    x: jax.Array,
    w: Any,
    *,
    activations: QuantFormat | None = None,
    codes: QuantTensor | None = None,
    out_dtype: DTypeLike | None = None,
    batch_invariant: bool = False,
) -> jax.Array:
    del codes  # what x becomes in any case
    if batch_invariant:
        how = {"activations": activations, "out_dtype": out_dtype}
        return in_tiles(functools.partial(matmul, **how), x, w, axes=1)
    dtype = x.dtype
    x, weight, kept = treat(x, w, activations)
    exact = precision(dtype, out_dtype)
    y = times(*dequantized_after(x, weight, dtype), exact)
    if kept is not None:
        assert isinstance(w, TreatedWeight)
        y = y + times(kept, w.columns.astype(dtype), exact)
    return y.astype(out_dtype or dtype)


def block_diagonal_matmul(x: jax.Array, w: Any, *, batch_invariant: bool = False) -> jax.Array:
    if batch_invariant:
        return in_tiles(block_diagonal_matmul, x, w, axes=2)
    x, weight, kept = treat(x, w, None)
    *rows, _, _ = x.shape
    y = times_groups(*dequantized_after(x, weight, x.dtype))
    if kept is not None:
        y = y + times_groups(kept, w.columns.astype(x.dtype))
    return y.astype(x.dtype).reshape(*rows, w.shape[0])


def in_tiles(run: Callable[[jax.Array, Any], jax.Array], x: jax.Array, w: Any, *, axes: int) -> jax.Array:
    """run(x, w) as one program for ROWS rows at a time, whatever their number; the last `axes` of x are no rows.

    XLA chooses by the size of a product how it adds: these have always the same. Where in a tile a row is does not
    matter.
    """
    rows, row = x.shape[:-axes], x.shape[-axes:]
    x = x.reshape(-1, *row)
    tiles = max(2, -(-x.shape[0] // ROWS))  # a loop of one would be no loop, and become a part of what is around it
    padded = jnp.pad(x, ((0, tiles * ROWS - x.shape[0]), *((0, 0) for _ in row))).reshape(tiles, ROWS, *row)
    y = jax.lax.map(lambda tile: run(*jax.lax.optimization_barrier((tile, w))), padded)
    return y.reshape(tiles * ROWS, y.shape[-1])[: x.shape[0]].reshape(*rows, y.shape[-1])


def precision(dtype: DTypeLike, out_dtype: DTypeLike | None) -> str | None:
    """float32 operands mean a layer that the released code keeps in float32: never TF32, never bf16 passes."""
    return "highest" if dtype == jnp.float32 and out_dtype == jnp.float32 else None


def times(x: jax.Array, w: jax.Array, precision: str | None) -> jax.Array:
    """x [..., I] times w [O, I] transposed, in float32."""
    contract_last = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w, contract_last, precision=precision, preferred_element_type=jnp.float32)


def times_groups(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., G, I] times the groups of rows of w [G O, I], in float32 [..., G, O]."""
    weight = w.reshape(x.shape[-2], -1, x.shape[-1])
    return jnp.einsum("...gi,goi->...go", x, weight, preferred_element_type=jnp.float32)

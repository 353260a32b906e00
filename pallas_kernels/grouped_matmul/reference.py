"""The definition. Few rows gather their experts' weights; many rows go through XLA's ragged dot."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.quant import QuantTensor, dequantize

# x [N, I] . w [E, O, I] over I, ragged over N: the [out, in] twin of jax.lax.ragged_dot.
_RAGGED = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)


def grouped_matmul(x: jax.Array, w: jax.Array | QuantTensor, counts: jax.Array) -> jax.Array:
    rows, experts = x.shape[0], counts.shape[0]
    if rows <= experts:
        # Decode: touch the weights that were hit and no others.
        expert_of_row = jnp.searchsorted(jnp.cumsum(counts), jnp.arange(rows), side="right")
        picked = jax.tree.map(lambda leaf: leaf[expert_of_row], w)
        return jnp.einsum("ni,noi->no", x, _plain(picked, x), preferred_element_type=jnp.float32).astype(x.dtype)
    y = jax.lax.ragged_dot_general(x, _plain(w, x), counts, _RAGGED, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def _plain(w: jax.Array | QuantTensor, x: jax.Array) -> jax.Array:
    return dequantize(w, x.dtype) if isinstance(w, QuantTensor) else w.astype(x.dtype)

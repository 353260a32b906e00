"""A dot product of the codes for every block of the contracted axis, each scaled, all summed in float32.

For scales that vary along it, as in the released format (x one for 1 x 128, w one for 128 x 128). XLA has no dot that
takes them: this is the baseline of a kernel that applies them to the accumulator.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.block_matmul.codes import ORDER, multiply
from pallas_kernels.formats import QuantFormat
from pallas_kernels.products import asked_of_dot, input_format, operands_unsupported_reason, stored
from pallas_kernels.quant.tensor import QuantTensor

# Up to here the results of all blocks of 128, [K / 128, rows, O] in float32, are no larger than w's codes, and one
# batched product makes them; more rows go block by block.
FEW_ROWS = 32


def unsupported_reason(
    x: jax.Array,
    w: Any,
    *,
    activations: QuantFormat | None = None,
    codes: QuantTensor | None = None,
    out_dtype: DTypeLike | None = None,
    batch_invariant: bool = False,
) -> str | None:
    del codes, out_dtype
    if batch_invariant:
        return ORDER
    if reason := operands_unsupported_reason(w, activations):
        return reason
    assert activations is not None
    columns = x.shape[-1]
    forms = input_format(w, columns, activations), stored(w).format
    wide = sorted(_widths(forms[0], forms[1], columns))
    if len(wide) > 1:
        return f"blocks of {wide[0]} and of {wide[1]} along the contracted axis do not line up"
    return f"K = {columns} is no multiple of the block of {wide[0]}" if wide and columns % wide[0] else None


def matmul(
    x: jax.Array,
    w: Any,
    *,
    activations: QuantFormat | None = None,
    codes: QuantTensor | None = None,
    out_dtype: DTypeLike | None = None,
    batch_invariant: bool = False,
) -> jax.Array:
    assert not batch_invariant, "unsupported_reason refuses it"
    return multiply(_dot, x, w, activations, codes, out_dtype)


def _widths(x: QuantFormat, w: QuantFormat, columns: int) -> set[int]:
    """The widths of blocks that divide K = `columns`: none, one that is shared, or two."""
    return {form.tile[1] for form in (x, w) if form.tile[1] is not None and form.tile[1] < columns}


def _dot(x: QuantTensor, w: QuantTensor) -> jax.Array:
    rows, columns = x.shape
    (width,) = _widths(x.format, w.format, columns) or {columns}
    blocks = columns // width
    # [blocks, rows or 1, 1] and [blocks, 1, O or 1]
    x_scale = jnp.broadcast_to(x.scale.astype(jnp.float32).T[:, :, None], (blocks, x.scale.shape[0], 1))
    w_scale = _row_scales(w)
    w_scale = jnp.broadcast_to(w_scale.T[:, None, :], (blocks, 1, w_scale.shape[0]))
    how = asked_of_dot(x.values)

    def scaled(y: jax.Array, block: Any = slice(None)) -> jax.Array:
        return y.astype(jnp.float32) * x_scale[block] * w_scale[block]

    if rows <= FEW_ROWS:
        xs, ws = (side.values.reshape(-1, blocks, width) for side in (x, w))
        return jnp.sum(scaled(jax.lax.dot_general(xs, ws, (((2,), (2,)), ((1,), (1,))), **how)), axis=0)

    def add(block: jax.Array, total: jax.Array) -> jax.Array:
        xs, ws = (jax.lax.dynamic_slice_in_dim(side.values, block * width, width, axis=1) for side in (x, w))
        return total + scaled(jax.lax.dot_general(xs, ws, (((1,), (1,)), ((), ())), **how), block)

    return jax.lax.fori_loop(0, blocks, add, jnp.zeros((rows, w.shape[0]), jnp.float32))


def _row_scales(w: QuantTensor) -> jax.Array:
    """float32 scales [O or 1, blocks or 1] of the rows of w."""
    scale, high = w.scale.astype(jnp.float32), w.format.tile[0]
    return scale if high in (None, 1) else jnp.repeat(scale, high, axis=0)[: w.shape[0]]

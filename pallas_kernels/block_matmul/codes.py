"""What surrounds a product of codes: the input's treatment and rounding before it, 16-bit channels after."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.typing import DTypeLike

from pallas_kernels.block_matmul import reference
from pallas_kernels.block_matmul.reference import precision, times
from pallas_kernels.formats import QuantFormat
from pallas_kernels.products import static_scale
from pallas_kernels.quant.tensor import QuantTensor
from pallas_kernels.quant.weights import TreatedWeight, quantize_input, treat
from pallas_kernels.straight_through import straight_through

ORDER = "XLA chooses by the number of rows in which order a row's products are added"


def multiply(
    dot: Callable[[QuantTensor, QuantTensor], jax.Array],
    x: jax.Array,
    w: Any,
    activations: QuantFormat | None,
    codes: QuantTensor | None,
    out_dtype: DTypeLike | None,
) -> jax.Array:
    """The reference's result by `dot`, which gives float32 [rows, O] for codes [rows, I] and [O, I].

    Scales multiply float32 sums, where the reference first rounds each dequantised operand to x's dtype. The gradient
    to x is that of the reference with x unrounded.
    """
    run = functools.partial(_multiply, dot, activations=activations, out_dtype=out_dtype)
    return straight_through(run, functools.partial(smooth, out_dtype=out_dtype))(x, (w, codes))


def smooth(x: jax.Array, constants: Any, out_dtype: DTypeLike | None) -> jax.Array:
    """The product whose gradient those of codes have: by the weight, of x as it is."""
    return reference.matmul(x, constants[0], out_dtype=out_dtype)


def input_codes(treated: jax.Array, x: jax.Array, w: Any, activations: QuantFormat, known: Any) -> QuantTensor:
    """The codes of a weight's input, of which `known` are those of x, as it was before the weight's treatment."""
    return quantize_input(treated, activations, static_scale(w), known if treated is x else None)


def _multiply(
    dot: Callable[[QuantTensor, QuantTensor], jax.Array],
    x: jax.Array,
    constants: Any,
    *,
    activations: QuantFormat | None,
    out_dtype: DTypeLike | None,
) -> jax.Array:
    assert activations is not None, "unsupported_reason refuses inputs that stay unrounded"
    w, codes = constants
    treated, weight, kept = treat(x, w, None)
    y = dot(input_codes(treated, x, w, activations, codes), weight).reshape(*x.shape[:-1], weight.shape[0])
    if kept is not None:
        assert isinstance(w, TreatedWeight)
        y = y + times(kept, w.columns.astype(x.dtype), precision(x.dtype, out_dtype))
    return y.astype(out_dtype or x.dtype)

"""Activations as a product of codes takes them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Op, kernel
from pallas_kernels.dispatch import reference as reference_candidate
from pallas_kernels.formats import FP8_GROUP, QuantFormat
from pallas_kernels.operands import require_floats, require_shape
from pallas_kernels.quant import QuantTensor
from pallas_kernels.quantize_rows import reference
from pallas_kernels.quantize_rows.tiling import unsupported_reason
from pallas_kernels.typing import typed


def _sm90(
    x: jax.Array,
    weight: jax.Array | None,
    eps: float | None,
    *,
    form: QuantFormat,
    tokens_last: bool = False,
    padded_rows: int | None = None,
) -> QuantTensor:
    from pallas_kernels.quantize_rows import kernel_sm90  # here: who runs no kernel does not wait for Pallas

    codes, scale = kernel_sm90.quantize_rows(
        x, weight, eps, form=form, tokens_last=tokens_last, padded_rows=padded_rows
    )
    # Transposed first, cast last: with a consumer that casts first and transposes last, XLA cancels all four.
    scale = scale.T if tokens_last else scale
    if form.scale == "ue8m0":
        scale = jax.lax.bitcast_convert_type(scale, jnp.float8_e8m0fnu)
    return QuantTensor(codes, scale, form)


QUANTIZE_ROWS = Op(
    "quantize_rows",
    [kernel(_sm90, unsupported_reason), reference_candidate(reference.quantize_rows)],
)


@typed
def quantize_rows(
    x: Float[Array, "M K"],
    form: QuantFormat = FP8_GROUP,
    *,
    tokens_last: bool = False,
    padded_rows: int | None = None,
    implementation: str = "auto",
) -> QuantTensor:
    """`quant.quantize(x, form)`, bit for bit: codes [P, K] and scales [P, K/128].

    tokens_last: the scales lie in memory as [K/128, P], so that `scale_bytes(result.scale).T`, which kernels for few
    rows take, costs nothing. padded_rows: P, M by default; the rows behind M are those of zeros. A row's bits depend
    on no other row.
    """
    return _run(x, None, None, form, tokens_last, padded_rows, implementation)


@typed
def rms_norm_quantize_rows(
    x: Float[Array, "M K"],
    weight: Float[Array, " K"] | None,
    eps: float,
    form: QuantFormat = FP8_GROUP,
    *,
    tokens_last: bool = False,
    padded_rows: int | None = None,
    implementation: str = "auto",
) -> QuantTensor:
    """`quantize_rows(rms_norm(x, weight, eps))`: the normed rows are rounded to x's dtype before they are quantised.

    A kernel adds the squares of a row in an order of its own, which moves a normed value by one step of x's dtype at
    most, and one bfloat16 in ten thousand or so; and its code or its scale where that lies on a boundary. Raises
    TypeError for an x or weight that is no array of floats and an eps that is no number, ValueError where they do not
    fit.
    """
    require_floats(x=x, **({} if weight is None else {"weight": weight}))
    if x.ndim != 2:
        raise ValueError(f"x has shape {x.shape}: rows [M, K]")
    if weight is not None:
        require_shape("weight", weight, x.shape[1:], "one for each channel of x")
    if eps is None:
        raise TypeError("eps is None: a number, such as 1e-6; quantize_rows does without the norm")
    return _run(x, weight, eps, form, tokens_last, padded_rows, implementation)


def _run(
    x: jax.Array,
    weight: jax.Array | None,
    eps: float | None,
    form: QuantFormat,
    tokens_last: bool,
    padded_rows: int | None,
    implementation: str,
) -> QuantTensor:
    if padded_rows is not None and padded_rows < x.shape[0]:
        raise ValueError(f"padded_rows is {padded_rows}, x has {x.shape[0]} rows")
    return QUANTIZE_ROWS(
        x, weight, eps, form=form, tokens_last=tokens_last, padded_rows=padded_rows, implementation=implementation
    )

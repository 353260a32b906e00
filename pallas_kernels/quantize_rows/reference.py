"""The definition: RMSNorm if asked for, zeros behind the rows if asked for, then `quant.quantize`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.formats import QuantFormat
from pallas_kernels.norm import rms_norm
from pallas_kernels.quant import QuantTensor, quantize


def quantize_rows(
    x: jax.Array,
    weight: jax.Array | None,
    eps: float | None,
    *,
    form: QuantFormat,
    tokens_last: bool = False,
    padded_rows: int | None = None,
) -> QuantTensor:
    del tokens_last  # an order in memory, which is XLA's own affair here
    if eps is not None:
        x = rms_norm(x, weight, eps)
        kind = jnp.finfo(x.dtype)  # compiled for a GPU, the rounding to x's dtype would be left out
        x = jax.lax.reduce_precision(x, kind.nexp, kind.nmant)
    if padded_rows is not None:
        x = jnp.pad(x, ((0, padded_rows - x.shape[0]), (0, 0)))
    return quantize(x, form)

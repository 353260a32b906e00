"""How the Hopper kernel cuts rows up, and which calls it takes. Nothing here imports Pallas."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels import device
from pallas_kernels.formats import QuantFormat
from pallas_kernels.quant.convert import NORMAL

GROUP = 128  # columns that share a scale
MOST_COLUMNS = 8192  # of a normalised row, which one warpgroup holds: 64 numbers a thread


@dataclass(frozen=True)
class RowTiling:
    """groups: of 128 columns that a warpgroup holds at once, its chunk. per_sm: thread blocks an SM gets, one warpgroup
    each; more than it holds at a time are dealt out as others end, which balances the SMs.

    No bit of the result depends on either: maxima have no order, and a mean is of a whole row in any case.
    """

    groups: int = 32
    per_sm: int = 32


def default_tiling(rows: int, padded: int, blocks: int, *, tokens_last: bool, whole_rows: bool, sms: int) -> RowTiling:
    """Chunks for `rows` rows of `blocks` groups, zeros up to `padded` rows: whole rows where their mean is needed, else
    as large a power of two as leaves two chunks for every SM and divides the problem.
    """
    if whole_rows:
        return RowTiling(blocks)
    # Where tokens are last, the scales of a chunk are one column: of one row.
    groups = math.gcd(blocks if tokens_last else blocks * math.gcd(rows, padded), RowTiling.groups)
    while groups > 8 and padded * blocks // groups < 2 * sms:
        groups //= 2
    return RowTiling(groups)


def form_reason(form: QuantFormat) -> str | None:
    """Why the registers' quantisation does not give this format, None if it does."""
    if (form.element, form.tile) != ("e4m3", (1, GROUP)) or form.scale not in ("ue8m0", "float32"):
        return f"{form.name} is not e4m3:1x{GROUP} with scales of ue8m0 or float32"
    if form.rounding != "nearest":
        return f"{form.rounding} rounding of codes"
    if form.amax_floor < NORMAL * form.largest:
        return f"a floor of {form.amax_floor:.3g}, whose scales come near the subnormals"
    return None


def unsupported_reason(
    x: jax.Array,
    weight: jax.Array | None,
    eps: float | None,
    *,
    form: QuantFormat,
    tokens_last: bool = False,
    padded_rows: int | None = None,
) -> str | None:
    """Why the Hopper kernel does not take this call, None if it does."""
    del weight, tokens_last, padded_rows
    here = device.current()
    if here.capability != (9, 0):
        return f"{here.name} is no Hopper GPU"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {x.dtype}, neither bfloat16 nor float32"
    if reason := form_reason(form):
        return reason
    if x.size == 0 or x.shape[1] % GROUP:
        return f"x of shape {x.shape} has no rows of a multiple of {GROUP} columns"
    if eps is not None and x.shape[1] > MOST_COLUMNS:
        return f"a mean over {x.shape[1]} columns: a warpgroup holds {MOST_COLUMNS}"
    return None

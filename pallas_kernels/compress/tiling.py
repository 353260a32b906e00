"""How a warpgroup holds an entry, and which calls the Hopper kernel takes. Nothing here imports Pallas."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import device
from pallas_kernels.compress.reference import CompressorState
from pallas_kernels.formats import FP8_ENTRY
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.quant.rows import Rows
from pallas_kernels.ring import MAX_STEP
from pallas_kernels.row_format import RowFormat, index_format

TILE = 64  # channels that share a scale
WIDE, NARROW = 512, (32, 64, 128)  # widths of an entry: over four warps, and in one
ROWS_AT_ONCE = 16  # of kv and of gate, whose loads are in flight together


class Held(NamedTuple):
    """An entry in registers, [groups, columns]."""

    groups: int
    columns: int


def held(width: int) -> Held:
    """Tiles of 64 over the four warps, or the whole entry in every warp."""
    return Held(width // TILE, TILE) if width == WIDE else Held(1, width)


def rows_at_once(ratio: int, halves: int) -> int:
    """How many of an entry's rows are loaded together; of more than fit, as many as divide a block."""
    if halves * ratio <= ROWS_AT_ONCE:
        return halves * ratio
    return next(n for n in range(ROWS_AT_ONCE, 0, -1) if ratio % n == 0)


def unsupported_reason(
    rows: Rows,
    kv: jax.Array,
    gate: jax.Array,
    state: CompressorState,
    start: jax.Array,
    count: jax.Array,
    ape: jax.Array,
    norm_weight: jax.Array,
    frequencies: jax.Array,
    *,
    norm_eps: float,
) -> str | None:
    """Why the Hopper kernel does not take this call, None if it does."""
    del start, count, norm_eps
    here, width = device.current(), norm_weight.shape[0]
    if here.capability != (9, 0) and not is_interpreted():
        return f"{here.name} is no Hopper GPU (compute capability 9.0)"
    if (kv.dtype, gate.dtype) != (jnp.float32, jnp.float32):
        return f"the projections are {kv.dtype} and {gate.dtype}: it takes float32"
    if 0 in kv.shape:
        return f"projections of {kv.shape}: there are no tokens"
    if width != WIDE and width not in NARROW:
        return f"entries are {width} wide: it takes {', '.join(map(str, NARROW))} and {WIDE}"
    ratio, halves = ape.shape[0], ape.shape[1] // width
    if kv.shape[1] <= MAX_STEP and state.kv.shape[1] < (least := halves * ratio + MAX_STEP - 1):
        return f"the open blocks have {state.kv.shape[1]} slots: it takes {least} or more"
    if 2 * frequencies.shape[0] > held(width).columns:
        return f"{2 * frequencies.shape[0]} rotary channels: it takes up to {held(width).columns}"
    return _format_reason(rows.format, width)


def _format_reason(form: RowFormat, width: int) -> str | None:
    if form.quant is None or (form == index_format("fp8") and width in NARROW):
        return None
    if form.quant != FP8_ENTRY or not form.tail:
        return f"rows of {form.quant.name}: it writes plain ones, FP8 entries and, up to {NARROW[-1]} wide, FP8 keys"
    if (width, form.tail) == (WIDE, TILE) or (width <= TILE and form.tail % 16 == 0 and width > form.tail):
        return None
    return f"FP8 entries of {width} channels with {form.tail} rotary ones: {WIDE} with {TILE}, or at most {TILE}"

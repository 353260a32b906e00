"""Rows quantised to where the blocks of their experts lie, as the MXFP4 kernel reads them, on Hopper.

Row p of the result is row source[p] of x (or row p, of rows that lie in blocks already), quantised in groups of 128
columns as `quantize_rows` does it, bit for bit; codes lie in the order of weights that are looked up or spread
(mosaic/e2m1_folded.py, e2m1_apart.py), and scales in front of the rows of their block, as float32 or its bits. One
launch therefore does what would be five: quantise, gather codes, gather scales, permute codes, transpose scales. A row
that several experts take is quantised for each of them: it comes from the L2, and its codes have to be written that
often anyway.

Thread blocks are one warpgroup, and there are many, as in `quantize_rows`. Padding is neither read nor written.

Bound: for every real row K bytes written and 2 K read, which mostly hit the L2 where rows are gathered / 3.35 TB/s.
Measured within whole layers alone, see kernel_sm90.py.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.formats import QuantFormat
from pallas_kernels.mosaic import e2m1_apart
from pallas_kernels.mosaic import e2m1_folded as e2m1
from pallas_kernels.mosaic.launch import compiler_params, sm_count, store_narrow
from pallas_kernels.mosaic.scales import scale_bits
from pallas_kernels.quantize_rows.kernel_sm90 import quantized, registers
from pallas_kernels.quantize_rows.tiling import GROUP, default_tiling

SCALES_APART = 32  # of a block and K block: a copy starts at 128 bytes whichever K block it starts with


def quantized_rows(
    x: jax.Array, token: jax.Array, tokens: int, form: QuantFormat, *, rows: int, gathered: bool, folded: bool
) -> tuple[jax.Array, jax.Array]:
    """Codes [P, K] and scales [P/rows, K/128, rows up to whole 32] for `expert_rows`, of blocks of `rows` rows.

    token int32 [P]: of a row, `tokens` where it is padding, which holds anything. x: [tokens, K] if it is `gathered`,
    else [P, K]. Scales are float32, of UE8M0 the int32 bits of it. K is a multiple of 512. folded: of the product that
    takes them, see `store_codes`.
    """
    (_, k), count = x.shape, len(token)
    groups_of_row = k // GROUP
    tiling = default_tiling(count, count, groups_of_row, tokens_last=True, whole_rows=False, sms=sm_count())
    groups, layout = tiling.groups, registers(tiling.groups)
    chunks = groups_of_row // groups

    def kernel(x_gmem, token_gmem, codes_gmem, scale_gmem):
        @plgpu.nd_loop((count // rows, rows, chunks), collective_axes="sm")
        def _chunks(info):
            block, row, chunk = info.index
            place = block * rows + row
            source = token_gmem[place]

            @pl.when(source < tokens)
            def _quantise():
                first = chunk * groups
                held = pl.ds((source if gathered else place) * groups_of_row + first, groups)
                wide = plgpu.load(x_gmem.at[held], layout=layout, optimized=False).astype(jnp.float32)
                codes, scale = quantized(wide, form, layout)
                store_codes(codes_gmem.at[pl.ds(place * groups_of_row + first, groups)], codes, layout, folded)
                store_narrow(scale_gmem, (block, pl.ds(first, groups), row), scale_words(scale, form))

    codes, scale = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((count * groups_of_row, GROUP), form.values_dtype),
            scales_type(count, rows, k, form),
        ),
        grid=(min(count * chunks, tiling.per_sm * sm_count()),),
        grid_names=("sm",),
        # No thread reads what a thread has written.
        compiler_params=compiler_params(unsafe_no_auto_barriers=True),
    )(x.reshape(-1, GROUP), token)
    return codes.reshape(count, k), scale


def store_codes(codes_gmem: Any, codes: jax.Array, layout: Any, folded: bool) -> None:
    """codes_gmem [G, 128] becomes codes [G, 128] in the order of a product whose scales are folded, or not."""
    (e2m1.store_halves if folded else e2m1_apart.store_evens)(codes_gmem, codes, layout)


def arranged(x: jax.Array, x_scale: jax.Array, rows: int, *, folded: bool) -> tuple[jax.Array, jax.Array]:
    """The same in jnp of codes x [M, K] and their scales [M, K/128], uint8 (UE8M0) or float32, without padding."""
    m, k = x.shape
    if x_scale.dtype == jnp.uint8:
        x_scale = scale_bits(x_scale)
    apart = jnp.swapaxes(x_scale.reshape(m // rows, rows, k // GROUP), 1, 2)
    in_order = e2m1.first_and_second_halves if folded else e2m1_apart.evens_and_odds
    return in_order(x), jnp.pad(apart, ((0, 0), (0, 0), (0, -rows % SCALES_APART)))


def scale_words(scale: jax.Array, form: QuantFormat) -> jax.Array:
    """Stored scales as they lie there."""
    return scale_bits(scale) if form.scale == "ue8m0" else scale


def scales_type(m: int, rows: int, k: int, form: QuantFormat) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(scales_shape(m, rows, k), jnp.int32 if form.scale == "ue8m0" else jnp.float32)


def scales_shape(m: int, rows: int, k: int) -> tuple[int, int, int]:
    return m // rows, k // GROUP, rows + -rows % SCALES_APART

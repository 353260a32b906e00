"""Rows to E4M3 codes and the scales of every 128 columns, on Hopper; alone, or behind RMSNorm in one pass over memory.

For every group g of 128 neighbours in a row of x [M, K]:

    scale[g] = max(max |x[g]|, floor) / 448, for UE8M0 rounded up to a power of two,   codes[g] = e4m3(x[g] / scale[g])

bit for bit what `quant.quantize` gives. A NaN or an infinity makes its whole group NaN. Powers of two divide exactly;
by other float32 scales GPUs divide to a bit or two of the quotient, XLA's code as this one. With RMSNorm, x is first
x rsqrt(mean(x^2) + eps) weight, rounded to x's dtype: the same bits too, but for the order of the sum of squares.

Thread blocks are one warpgroup, and there are many: an SM holds enough of them to keep loads in flight while others
reduce and store, so nothing goes through shared memory and nothing is pipelined by hand. A warpgroup takes a chunk of
groups into registers: 16 lanes a group and 16 bytes of bfloat16 a lane and load, so that a maximum is eight numbers of
a thread and four shuffles. A chunk is any run of groups, or with RMSNorm one row, whose sum crosses the four warps.
Maxima are those of the magnitudes' bits as integers, which are ordered as the magnitudes are, infinity and NaN on top;
scales are made by integer arithmetic, too, for Hopper's registers have no UE8M0.

Bound: (2 + 1 + 1/128) M K bytes of bfloat16 / 3.35 TB/s, and about 2 us of launch and latency. About 10 instructions
an element are a third of what an SM can issue meanwhile. For 4096 rows of 4096 an H200 measured 13.8 us, 76 % of it,
behind RMSNorm 18.1, 58 %.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.formats import QuantFormat
from pallas_kernels.mosaic.launch import compiler_params, sm_count, store_narrow
from pallas_kernels.quantize_rows.tiling import GROUP, RowTiling, default_tiling

MAGNITUDE, INFINITY, NAN = 0x7FFFFFFF, 0x7F800000, 0x7FC00000  # bits of a float32: all but the sign, and two values
FRACTION_BITS, FRACTION = 23, 0x7FFFFF
NAN_CODE = 255  # of UE8M0


def quantize_rows(
    x: jax.Array,
    weight: jax.Array | None = None,
    eps: float | None = None,
    *,
    form: QuantFormat,
    tokens_last: bool = False,
    padded_rows: int | None = None,
    tiling: RowTiling | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Codes float8_e4m3fn [P, K] and scales [P, K/128], or [K/128, P] with tokens_last, of x [M, K].

    Scales are uint8 where `form` has UE8M0, else float32. eps: of RMSNorm with weight [K] (or None), before anything
    else; None for no RMSNorm. padded_rows: P, M by default; the rows behind M are those of zeros.
    """
    (rows, columns), blocks = x.shape, x.shape[1] // GROUP
    padded = rows if padded_rows is None else padded_rows
    if tiling is None:
        kind = {"tokens_last": tokens_last, "whole_rows": eps is not None}
        tiling = default_tiling(rows, padded, blocks, **kind, sms=sm_count())
    groups = tiling.groups
    real, chunks = rows * blocks // groups, padded * blocks // groups
    assert (rows * blocks % groups, padded * blocks % groups) == (0, 0), f"{(rows, padded, blocks)} in {tiling}"
    assert blocks % groups == 0 or not tokens_last, f"{tiling}: a column of scales is of one row, of {blocks} groups"
    assert blocks == groups or eps is None, f"{tiling}: a mean is of one row, of {blocks} groups"
    layout = registers(groups)
    codes_type = jax.ShapeDtypeStruct((padded * blocks, GROUP), form.values_dtype)
    scale_type = jax.ShapeDtypeStruct(
        (blocks, padded) if tokens_last else (padded * blocks,), jnp.uint8 if form.scale == "ue8m0" else jnp.float32
    )

    def kernel(x_gmem, weight_gmem, codes_gmem, scale_gmem):
        @plgpu.nd_loop((chunks,), collective_axes="sm")
        def _chunks(info):
            (chunk,) = info.index
            held = pl.ds(chunk * groups, groups)

            def read():
                factors = None
                if weight_gmem is not None:  # before x, so that few rows do not wait for memory twice
                    factors = plgpu.load(weight_gmem, layout=layout, optimized=False)
                wide = plgpu.load(x_gmem.at[held], layout=layout, optimized=False).astype(jnp.float32)
                return wide if eps is None else normed(wide, factors, eps).astype(x.dtype).astype(jnp.float32)

            def normed(wide, factors, eps):
                squares = jnp.sum(wide * wide, axis=1)
                squares = jnp.sum(squares) if groups > 1 else spread(squares, layout)
                divided = wide * lax.rsqrt(squares / columns + eps)
                return divided if factors is None else divided * factors.astype(jnp.float32)

            def write(wide):
                codes, scale = quantized(wide, form, layout)
                codes_gmem[held] = codes
                if tokens_last:
                    column = pl.ds(lax.rem(chunk * groups, blocks), groups)
                    store_narrow(scale_gmem, (column, lax.div(chunk * groups, blocks)), scale)
                else:
                    store_narrow(scale_gmem, held, scale)

            if real == chunks:
                write(read())
            else:
                pl.when(chunk < real)(lambda: write(read()))
                zeros = jnp.zeros((groups, GROUP), jnp.float32)
                pl.when(chunk >= real)(lambda: write(plgpu.layout_cast(zeros, layout)))

    codes, scale = plgpu.kernel(
        kernel,
        out_type=(codes_type, scale_type),
        grid=(min(chunks, tiling.per_sm * sm_count()),),
        grid_names=("sm",),
        # No thread reads what a thread has written; sums over warps bring barriers of their own.
        compiler_params=compiler_params(unsafe_no_auto_barriers=True),
    )(x.reshape(-1, GROUP), None if weight is None else weight.reshape(-1, GROUP))
    return codes.reshape(padded, columns), scale if tokens_last else scale.reshape(padded, blocks)


def quantized(wide: jax.Array, form: QuantFormat, layout: Any) -> tuple[jax.Array, jax.Array]:
    """Codes [G, 128] and stored scales [G] of float32 [G, 128] in registers."""

    def float_of(bits: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(bits, jnp.float32)

    peak = jnp.max(lax.bitcast_convert_type(wide, jnp.int32) & MAGNITUDE, axis=1)
    finite = peak < INFINITY
    amax = float_of(jnp.clip(peak, bits_of(form.amax_floor), bits_of(form.amax_ceiling)))
    exact = lax.bitcast_convert_type(amax * np.float32(1 / form.largest), jnp.int32)
    if form.power_of_two:
        code = (exact + FRACTION) >> FRACTION_BITS  # a fraction carries into the exponent: up
        stored = jnp.where(finite, code, NAN_CODE).astype(jnp.uint8)
        if form.scale == "float32":
            stored = float_of(jnp.where(finite, code << FRACTION_BITS, NAN))
        ratio = wide * spread(float_of(jnp.where(finite, (254 - code) << FRACTION_BITS, NAN)), layout)  # 2^(127 - code)
    else:
        stored = float_of(jnp.where(finite, exact, NAN))
        ratio = wide / spread(stored, layout)
    return jnp.clip(ratio, -form.largest, form.largest).astype(form.values_dtype), stored


def spread(vector: jax.Array, layout: Any) -> jax.Array:
    """[G] to every column of [G, 128]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, (vector.shape[0], GROUP), [0]), layout)


def registers(groups: int) -> Any:
    """How a warpgroup holds [groups, 128]: eight neighbours a thread, two groups a warp, eight a step.

    Where that does not divide the groups, four neighbours a thread and a group a warp; fewer than four groups are held
    by several warps at once, which write the same.
    """
    if groups % 8 == 0:
        return plgpu.Layout.TILED(plgpu.Tiling(((8, GROUP), (2, GROUP), (8,))), (-5,), (-3, -2), -1)
    warps = math.gcd(groups, 4)
    warp_dims = {4: (-3,), 2: (plgpu.Replicated(2), -3), 1: (plgpu.Replicated(4),)}[warps]
    return plgpu.Layout.TILED(plgpu.Tiling(((warps, GROUP), (4,))), warp_dims, (-2,), -1)


def bits_of(value: float) -> int:
    return int(np.float32(value).view(np.int32))

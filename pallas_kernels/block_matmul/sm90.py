"""The Hopper kernels as an implementation of `block_matmul`: which calls they take, padding, and which one runs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import device
from pallas_kernels.block_matmul import reference, tilings
from pallas_kernels.block_matmul.tiling import FewRows, ManyRows
from pallas_kernels.formats import QuantFormat
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.scales import scale_bytes
from pallas_kernels.products import FLOAT8, static_scale, stored
from pallas_kernels.quant.tensor import QuantTensor
from pallas_kernels.quant.weights import TreatedWeight, quantize_input, treat
from pallas_kernels.straight_through import straight_through

CAPABILITY = (9, 0)  # wgmma is Hopper's alone
NO_HOPPER = "is no Hopper GPU (compute capability 9.0)"
BLOCK = 128
ONCE = ((1, None), (None, None))  # tiles whose scales do not vary along K: they multiply finished sums
DTYPES = (jnp.bfloat16, jnp.float32)


def unsupported_reason(
    x: jax.Array, w: Any, *, activations: QuantFormat | None = None, out_dtype: DTypeLike | None = None
) -> str | None:
    if reason := device_reason() or codes_reason(w, activations, x.shape[-1]):
        return reason
    out = jnp.dtype(out_dtype or x.dtype)
    if out not in DTYPES:
        return f"results in {out}: it writes bfloat16 and float32"
    n, rows = stored(w).shape[0], x.size // x.shape[-1]
    if rows == 0:
        return "there are no rows"
    if _tiling(rows, n, x.shape[-1], out) is None:
        return f"no tiling fits weights of {n} rows: a multiple of 64"
    return None


def device_reason() -> str | None:
    """Why wgmma does not run here: in the interpreter it does on any device."""
    here = device.current()
    if is_interpreted() or here.capability == CAPABILITY:
        return None
    return f"{here.name} {NO_HOPPER}"


def operands_reason(w: Any, activations: QuantFormat | None, k: int) -> str | None:
    """Why the formats of x [..., k] and w are not those of the released FP8 layers, E4M3 in blocks."""
    weight = stored(w)
    if isinstance(weight, QuantTensor) and (weight.format.element, weight.format.tile) != ("e4m3", (BLOCK, BLOCK)):
        return f"weights are {weight.format.name}: it takes e4m3 in 128 x 128 blocks"
    if activations is not None and (activations.element, activations.tile) != ("e4m3", (1, BLOCK)):
        return f"activations are {activations.name}: it takes e4m3 in 1 x 128 groups"
    return codes_reason(w, activations, k)


def codes_reason(w: Any, activations: QuantFormat | None, k: int) -> str | None:
    """Why the formats of x [..., k] and w are not those that the kernels multiply."""
    weight = stored(w)
    if not isinstance(weight, QuantTensor):
        return "the weight is not quantised"
    form = weight.format
    if form.element not in FLOAT8 or form.tile not in ((BLOCK, BLOCK), *ONCE):
        return f"weights are {form.name}: it takes e4m3 or e5m2, scales of 128 x 128 blocks, rows or the whole"
    if activations is None:
        return "activations are not quantised"
    tiles, named = (ONCE, "rows or the whole") if form.tile in ONCE else ([(1, BLOCK)], "1 x 128 groups")
    if activations.element not in FLOAT8 or activations.tile not in tiles:
        return f"activations are {activations.name}: by {form.name} it takes e4m3 or e5m2, scales of {named}"
    if form.tile not in ONCE:
        if activations.scale != form.scale:
            return f"scales of activations are {activations.scale}, of weights {form.scale}: it takes them of one type"
        if form.scale == "bfloat16":
            return "scales of blocks are bfloat16: it takes ue8m0 and float32"
        if static_scale(w) is not None:
            return "the activation scale is static: it takes one for every group"
    return None if k % BLOCK == 0 else f"K = {k} is no multiple of the block of {BLOCK}"


def matmul(
    x: jax.Array, w: Any, *, activations: QuantFormat | None = None, out_dtype: DTypeLike | None = None
) -> jax.Array:
    """x @ w.T in `out_dtype` (default: x's); the gradient to x is that of the reference with x unrounded."""
    smooth = functools.partial(reference.matmul, out_dtype=out_dtype)
    return straight_through(functools.partial(_matmul, activations=activations, out_dtype=out_dtype), smooth)(x, w)


def _matmul(x: jax.Array, w: Any, *, activations: QuantFormat | None, out_dtype: DTypeLike | None) -> jax.Array:
    assert activations is not None, "unsupported_reason refuses inputs that stay unrounded"
    treated, weight, kept = treat(x, w, None)
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    # 16-bit channels are added to float32 sums.
    codes = quantize_input(treated, activations, static_scale(w))
    y = product(codes, weight, out_dtype if kept is None else jnp.float32)
    y = y.reshape(*x.shape[:-1], -1)
    if kept is not None:
        assert isinstance(w, TreatedWeight)
        y = y + reference.times(kept, w.columns.astype(x.dtype), reference.precision(x.dtype, out_dtype))
    return y.astype(out_dtype)


def product(x: QuantTensor, w: QuantTensor, out_dtype: DTypeLike) -> jax.Array:
    """[m, n] of the codes x [m, k] and w [n, k], by the kernel and tiling that measured fastest near this shape."""
    from pallas_kernels.block_matmul import decode_sm90, kernel_sm90  # Pallas is slow to import

    (m, k), n = x.shape, w.shape[0]
    tiling = _tiling(m, n, k, out_dtype)
    assert tiling is not None, "unsupported_reason refuses what no tiling fits"
    few, behind = isinstance(tiling, FewRows), tilings.padded_rows(m, tiling) - m
    if w.format.tile in ONCE:
        scale, w_scale = (
            jnp.broadcast_to(side.scale.astype(jnp.float32)[:, 0], (rows,)) for side, rows in ((x, m), (w, n))
        )
        scale = jnp.pad(scale, (0, behind))
    else:
        w_scale = scale_bytes(w.scale)
        scale = jnp.pad(scale_bytes(x.scale), ((0, behind), (0, 0)))
        scale = scale.T if few else scale
    codes = jnp.pad(x.values, ((0, behind), (0, 0)))
    multiply: Any = decode_sm90.matmul if few else kernel_sm90.matmul
    return multiply(codes, scale, w.values, w_scale, tiling, out_dtype)[:m]


def _tiling(m: int, n: int, k: int, out_dtype: DTypeLike) -> FewRows | ManyRows | None:
    """As measured, with bfloat16 results; for float32 ones, which are not for speed, one that always fits.

    The kernel for few rows writes no float32 on a GPU, and tiles of float32 on their way out take as much more shared
    memory as one buffer less leaves.
    """
    if out_dtype != jnp.float32:
        return tilings.dense_tiling(m, n, k)
    tiling = tilings.default_many_rows(tilings.Problem(m, n, k))
    return tiling and dataclasses.replace(tiling, stages=tiling.stages - 1)

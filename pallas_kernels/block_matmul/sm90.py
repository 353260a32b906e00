"""The Hopper kernels as implementations of the dense matmuls: which calls they take, padding, and which one runs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import device
from pallas_kernels.block_matmul import reference, tilings, weight_only
from pallas_kernels.block_matmul.codes import input_codes, smooth
from pallas_kernels.block_matmul.tiling import FewRows, ManyRows
from pallas_kernels.block_matmul.weight_only import ONCE
from pallas_kernels.formats import QuantFormat
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.scales import scale_bytes
from pallas_kernels.products import FLOAT8, static_scale, stored
from pallas_kernels.quant.tensor import QuantTensor
from pallas_kernels.quant.weights import TreatedWeight, treat
from pallas_kernels.straight_through import straight_through

CAPABILITY = (9, 0)  # wgmma is Hopper's alone
NO_HOPPER = "is no Hopper GPU (compute capability 9.0)"
BLOCK = 128
FILLED_BYTES = 2**22  # of a weight, at most, that is filled up to whole blocks
TREATED = "the input is rotated or has channels in 16 bits: XLA may add in another order where there are other rows"
DTYPES = (jnp.bfloat16, jnp.float32)


def unsupported_reason(
    x: jax.Array,
    w: Any,
    *,
    activations: QuantFormat | None = None,
    codes: QuantTensor | None = None,
    out_dtype: DTypeLike | None = None,
    batch_invariant: bool = False,
) -> str | None:
    del codes
    if reason := device_reason():
        return reason
    by_codes = activations is not None
    if reason := codes_reason(w, activations, x.shape[-1]) if by_codes else weight_only.operands_reason(x, w):
        return reason
    out = jnp.dtype(out_dtype or x.dtype)
    if reason := results_reason(x, out) or (treated_reason(w) if batch_invariant else None):
        return reason
    (n, k), rows = stored(w).shape, x.size // x.shape[-1]
    how = {"batch_invariant": batch_invariant}
    if by_codes and _tiling(rows, n, whole(k, BLOCK), out, **how) is None:
        return f"no tiling fits weights of {n} rows: a multiple of 64"
    if not by_codes and weight_only.tiling(rows, stored(w), out, **how) is None:
        return no_weight_only_tiling(n, k)
    return None


def block_diagonal_unsupported_reason(x: jax.Array, w: Any, *, batch_invariant: bool = False) -> str | None:
    if reason := device_reason() or weight_only.operands_reason(x, w) or results_reason(x, x.dtype):
        return reason
    if batch_invariant and (reason := treated_reason(w)):
        return reason
    groups, (n, k) = x.shape[-2], stored(w).shape
    how = {"batch_invariant": batch_invariant}
    if weight_only.tiling(x.size // (groups * k), stored(w), x.dtype, groups, **how) is None:
        return no_weight_only_tiling(n // groups, k)
    return None


def results_reason(x: jax.Array, out_dtype: DTypeLike) -> str | None:
    """Why these rows have no results that the kernels write."""
    if out_dtype not in DTYPES:
        return f"results in {out_dtype}: it writes bfloat16 and float32"
    return "there are no rows" if x.size == 0 else None


def treated_reason(w: Any) -> str | None:
    """Why a row's bits may depend on the others although the kernels' do not."""
    return TREATED if isinstance(w, TreatedWeight) and (w.channels is not None or w.rotated) else None


def no_weight_only_tiling(n: int, k: int) -> str:
    return f"no tiling fits weights [{n}, {k}]: multiples of 64, of 128 along K with float32 scales of blocks"


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
    return unfilled_reason(weight, k, BLOCK)


def unfilled_reason(w: QuantTensor, k: int, block: int) -> str | None:
    """Why w [..., k] is not filled up to whole blocks: it would be copied at every call."""
    if k % block == 0 or w.nbytes <= FILLED_BYTES:
        return None
    return f"K = {k} is no multiple of {block}, and to fill up {w.nbytes} bytes of weights at every call is too much"


def filled(w: QuantTensor, *shape: int) -> QuantTensor:
    """w with zeros behind its last axes, which become `shape`."""
    leading = w.shape[: w.ndim - len(shape)]
    if (whole := (*leading, *shape)) == w.shape:
        return w
    of_values, of_scale = (*whole[:-1], whole[-1] // w.format.packing), w.format.scale_shape(whole)
    values = jnp.pad(w.values, [(0, want - has) for want, has in zip(of_values, w.values.shape, strict=True)])
    behind = [(0, want - has) for want, has in zip(of_scale, w.scale.shape, strict=True)]
    return QuantTensor(values, jnp.pad(w.scale, behind, mode="edge"), w.format)


def whole(size: int, block: int) -> int:
    """`size`, filled up to a multiple of `block`."""
    return -(-size // block) * block


def matmul(
    x: jax.Array,
    w: Any,
    *,
    activations: QuantFormat | None = None,
    codes: QuantTensor | None = None,
    out_dtype: DTypeLike | None = None,
    batch_invariant: bool = False,
) -> jax.Array:
    """x @ w.T in `out_dtype` (default: x's); the gradient to x is that of the reference with x unrounded."""
    how = {"activations": activations, "out_dtype": out_dtype, "batch_invariant": batch_invariant}
    run = straight_through(functools.partial(_matmul, **how), functools.partial(smooth, out_dtype=out_dtype))
    return run(x, (w, codes))


def _matmul(
    x: jax.Array, constants: Any, *, activations: QuantFormat | None, out_dtype: DTypeLike | None, batch_invariant: bool
) -> jax.Array:
    w, known = constants
    treated, weight, kept = treat(x, w, None)
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    # 16-bit channels are added to float32 sums.
    result = out_dtype if kept is None else jnp.float32
    if activations is None:
        rows = treated.reshape(-1, treated.shape[-1])
        y = weight_only.product(rows, weight, result, batch_invariant=batch_invariant)
    else:
        codes = input_codes(treated, x, w, activations, known)
        y = product(codes, weight, result, batch_invariant=batch_invariant)
    y = y.reshape(*x.shape[:-1], -1)
    if kept is not None:
        assert isinstance(w, TreatedWeight)
        y = y + reference.times(kept, w.columns.astype(x.dtype), reference.precision(x.dtype, out_dtype))
    return y.astype(out_dtype)


def block_diagonal_matmul(x: jax.Array, w: Any, *, batch_invariant: bool = False) -> jax.Array:
    """Group g of x [*rows, G, I] times its rows of w [G O, I], in x's dtype; the gradient is that of the reference."""
    run = functools.partial(_block_diagonal_matmul, batch_invariant=batch_invariant)
    return straight_through(run, reference.block_diagonal_matmul)(x, w)


def _block_diagonal_matmul(x: jax.Array, w: Any, *, batch_invariant: bool) -> jax.Array:
    treated, weight, kept = treat(x, w, None)
    *rows, groups, columns = x.shape
    result = x.dtype if kept is None else jnp.float32
    y = weight_only.product(
        treated.reshape(-1, groups * columns), weight, result, groups, batch_invariant=batch_invariant
    )
    if kept is not None:
        assert isinstance(w, TreatedWeight)
        y = y + reference.times_groups(kept, w.columns.astype(x.dtype)).reshape(y.shape)
    return y.astype(x.dtype).reshape(*rows, -1)


def product(x: QuantTensor, w: QuantTensor, out_dtype: DTypeLike, *, batch_invariant: bool = False) -> jax.Array:
    """[m, n] of the codes x [m, k] and w [n, k], by the kernel and tiling that measured fastest near this shape."""
    from pallas_kernels.block_matmul import decode_sm90, kernel_sm90  # Pallas is slow to import

    (m, k), n = x.shape, w.shape[0]
    beside = whole(k, BLOCK) - k
    k, w = k + beside, filled(w, n, k + beside)
    tiling = _tiling(m, n, k, out_dtype, batch_invariant=batch_invariant)
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
    codes = jnp.pad(x.values, ((0, behind), (0, beside)))
    multiply: Any = decode_sm90.matmul if few else kernel_sm90.matmul
    return multiply(codes, scale, w.values, w_scale, tiling, out_dtype)[:m]


def _tiling(m: int, n: int, k: int, out_dtype: DTypeLike, *, batch_invariant: bool) -> FewRows | ManyRows | None:
    """As measured, with bfloat16 results; for float32 ones, which are not for speed, one that always fits.

    Tiles of float32 on their way out take as much more shared memory as one buffer less leaves.
    """
    if out_dtype != jnp.float32:
        return tilings.dense_tiling(m, n, k, batch_invariant=batch_invariant)
    tiling = tilings.default_many_rows(tilings.Problem(m, n, k))
    return tiling and dataclasses.replace(tiling, stages=tiling.stages - 1)

"""The Hopper kernels as an implementation of `experts`: which layers they take, and how those are cut."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.block_matmul.sm90 import (
    BLOCK,
    DTYPES,
    device_reason,
    filled,
    operands_reason,
    unfilled_reason,
    whole,
)
from pallas_kernels.block_matmul.tilings import Problem, default_many_rows
from pallas_kernels.formats import MXFP4, QuantFormat, format_name
from pallas_kernels.grouped_matmul import tilings
from pallas_kernels.grouped_matmul.gradient import OBSERVED, with_gradient
from pallas_kernels.grouped_matmul.one_token_tiling import OneToken
from pallas_kernels.grouped_matmul.tiling import SCALED, default_mxfp4
from pallas_kernels.grouped_matmul.tilings import LayerTiling
from pallas_kernels.products import static_scale, stored
from pallas_kernels.quant.tensor import QuantTensor
from pallas_kernels.quant.weights import ObservedWeight, TreatedWeight
from pallas_kernels.router import Routing

TAKEN = (("e4m3", (BLOCK, BLOCK)), (MXFP4.element, MXFP4.tile))  # weights, but for their scales
FLOAT32_ROWS = 128  # of a block: the tile of the kernel for many rows
FLOAT32_MXFP4_ROWS = 32


def unsupported_reason(
    x: jax.Array,
    w1: Any,
    w3: Any,
    w2: Any,
    routing: Routing,
    *,
    limit: float,
    activations: QuantFormat | None = None,
    batch_invariant: bool = False,
) -> str | None:
    del limit
    if isinstance(w2, ObservedWeight):
        return OBSERVED
    for w in (w1, w3, w2):
        if reason := device_reason() or layer_operands_reason(w, activations):
            return reason
    if len(names := {format_name(stored(w).format) for w in (w1, w3, w2)}) > 1:
        return f"weights are {' and '.join(sorted(names))}: it takes them in one format"
    if x.dtype not in DTYPES:
        return f"tokens in {x.dtype}: it takes bfloat16 and float32"
    if 0 in routing.experts.shape:
        return "there are no tokens"
    if _tiling(x, w1, routing, batch_invariant) is None:
        return f"no tiling fits experts [{w1.shape[1]}, {x.shape[1]}]"
    return None


def layer_operands_reason(w: Any, activations: QuantFormat | None) -> str | None:
    """Why w, one of the layer's three, is not what the kernels multiply by codes in the format `activations`."""
    weight, reason_of = stored(w), mxfp4_reason if is_mxfp4(w) else operands_reason
    if reason := reason_of(w, activations, w.shape[-1]):
        other = isinstance(weight, QuantTensor) and (weight.format.element, weight.format.tile) not in TAKEN
        return f"{reason}, or MXFP4" if other else reason
    assert activations is not None
    if activations.rounding != "nearest":
        return f"activations are rounded by {activations.rounding}: it rounds to nearest"
    if isinstance(w, TreatedWeight) and w.channels is not None:
        return "channels of the input stay in 16 bits: it multiplies codes alone"
    if isinstance(w, TreatedWeight) and w.rotated:
        return "the input is rotated before it is rounded"
    return None


def is_mxfp4(w: Any) -> bool:
    return isinstance(stored(w), QuantTensor) and stored(w).format.layout == MXFP4.layout


def mxfp4_reason(w: Any, activations: QuantFormat | None, k: int) -> str | None:
    """Why the formats of x [..., k] and the MXFP4 weight w are not those of the released experts."""
    if activations is None:
        return "activations are not quantised"
    if (activations.element, activations.tile) != ("e4m3", (1, BLOCK)) or activations.scale == "bfloat16":
        return f"activations are {activations.name}: by MXFP4 it takes e4m3:1x128 with scales of ue8m0 or float32"
    if static_scale(w) is not None:
        return "the activation scale is static: it takes one for every group"
    return unfilled_reason(stored(w), k, SCALED)


def experts(
    x: jax.Array,
    w1: Any,
    w3: Any,
    w2: Any,
    routing: Routing,
    *,
    limit: float,
    activations: QuantFormat | None = None,
    batch_invariant: bool = False,
) -> jax.Array:
    """The layer for tokens x [N, D]; gradients are those of the reference with tokens and hidden rows unrounded."""
    assert activations is not None, "unsupported_reason refuses inputs that stay unrounded"
    run = functools.partial(_experts, activations=activations, batch_invariant=batch_invariant)
    return with_gradient(run, x, stored(w1), stored(w3), stored(w2), routing, limit=limit)


def _experts(
    x: jax.Array,
    w1: Any,
    w3: Any,
    w2: Any,
    routing: Routing,
    *,
    limit: float,
    activations: QuantFormat,
    batch_invariant: bool,
) -> jax.Array:
    tiling = _tiling(x, w1, routing, batch_invariant)
    assert tiling is not None, "unsupported_reason refuses what no tiling fits"
    _, i, d = _whole(w1)
    weights = filled(w1, i, d), filled(w3, i, d), filled(w2, d, i)
    tokens = jnp.pad(x, ((0, 0), (0, d - x.shape[1])))
    return tiled(tokens, weights, routing, tiling, limit=limit, activations=activations)[:, : x.shape[1]]


def tiled(
    x: jax.Array, weights: tuple[Any, Any, Any], routing: Routing, tiling: LayerTiling | OneToken, **how: Any
) -> jax.Array:
    """The layer of w1, w3 and w2 by the kernels that a tiling is for. how: limit and activations."""
    from pallas_kernels.grouped_matmul import kernel_sm90, one_token_layer_sm90  # Pallas is slow to import

    if isinstance(tiling, OneToken):
        return one_token_layer_sm90.experts(x, *weights, routing, tiling=tiling, **how)
    how |= {"rows": tiling.rows, "gate_up": tiling.gate_up, "down": tiling.down}
    return kernel_sm90.experts(x, *weights, routing, **how)


def _whole(w1: Any) -> tuple[int, int, int]:
    """The shape of w1 [E, I, D], filled up to blocks that the kernels multiply."""
    count, i, d = w1.shape
    block = SCALED if is_mxfp4(w1) else BLOCK
    return count, whole(i, block), whole(d, block)


def _tiling(x: jax.Array, w1: Any, routing: Routing, batch_invariant: bool) -> LayerTiling | OneToken | None:
    (tokens, top), (count, i, d) = routing.experts.shape, _whole(w1)
    how = {"mxfp4": is_mxfp4(w1), "batch_invariant": batch_invariant}
    return layer_tiling(tokens, top, count, d, i, x.dtype, **how)


def layer_tiling(
    tokens: int,
    top: int,
    experts: int,
    d: int,
    i: int,
    dtype: DTypeLike,
    *,
    mxfp4: bool = False,
    batch_invariant: bool = False,
) -> LayerTiling | OneToken | None:
    """By the rows that an expert has on average, as measured; in float32, which is not for speed, one that always fits.

    Tables are of bfloat16. Tiles of float32 on their way out take as much more shared memory as one buffer less leaves.
    """
    if dtype != jnp.float32:
        return tilings.layer_tiling(tokens, top, experts, d, i, mxfp4=mxfp4, batch_invariant=batch_invariant)
    if mxfp4:
        part = functools.partial(Problem, tokens * top, experts=experts, rows=FLOAT32_MXFP4_ROWS)
        how = {"itemsize": 4, "batch_invariant": True}
        gate_up, down = default_mxfp4(part(i, d, weights=2), **how), default_mxfp4(part(d, i), **how)
        return LayerTiling(FLOAT32_MXFP4_ROWS, gate_up, down) if gate_up and down else None
    part = functools.partial(Problem, tokens * top, experts=experts, rows=FLOAT32_ROWS)
    gate_up, down = default_many_rows(part(i, d, weights=2)), default_many_rows(part(d, i))
    if gate_up is None or down is None:
        return None
    gate_up, down = (dataclasses.replace(tiling, stages=tiling.stages - 1) for tiling in (gate_up, down))
    return LayerTiling(FLOAT32_ROWS, gate_up, down)

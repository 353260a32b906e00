"""The Hopper kernels as an implementation of `experts`: which layers they take, and how those are cut."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.block_matmul.sm90 import DTYPES, device_reason, operands_reason
from pallas_kernels.block_matmul.tilings import Problem, default_many_rows
from pallas_kernels.formats import FP8_GROUP, QuantFormat
from pallas_kernels.grouped_matmul import tilings
from pallas_kernels.grouped_matmul.gradient import OBSERVED, with_gradient
from pallas_kernels.grouped_matmul.tilings import LayerTiling
from pallas_kernels.products import stored
from pallas_kernels.quant.weights import ObservedWeight, TreatedWeight
from pallas_kernels.router import Routing

FLOAT32_ROWS = 128  # of a block: the tile of the kernel for many rows


def unsupported_reason(
    x: jax.Array,
    w1: Any,
    w3: Any,
    w2: Any,
    routing: Routing,
    *,
    limit: float,
    activations: QuantFormat | None = None,
) -> str | None:
    del limit
    if isinstance(w2, ObservedWeight):
        return OBSERVED
    for w in (w1, w3, w2):
        if reason := device_reason() or layer_operands_reason(w, activations):
            return reason
    if x.dtype not in DTYPES:
        return f"tokens in {x.dtype}: it takes bfloat16 and float32"
    if 0 in routing.experts.shape:
        return "there are no tokens"
    if _tiling(x, w1, routing) is None:
        return f"no tiling fits experts [{w1.shape[1]}, {x.shape[1]}]"
    return None


def layer_operands_reason(w: Any, activations: QuantFormat | None) -> str | None:
    """Why w, one of the layer's three, is not what the kernels multiply by codes in the format `activations`."""
    if reason := operands_reason(w, activations, w.shape[-1]):
        return reason
    if activations != FP8_GROUP:
        return f"activations are {_rounding(activations)}: it rounds to {_rounding(FP8_GROUP)}"
    if isinstance(w, TreatedWeight) and w.channels is not None:
        return "channels of the input stay in 16 bits: it multiplies codes alone"
    if isinstance(w, TreatedWeight) and w.rotated:
        return "the input is rotated before it is rounded"
    return None


def _rounding(form: QuantFormat | None) -> str:
    return "plain" if form is None else f"{form.name} to {form.rounding} with floor {form.floor}"


def experts(
    x: jax.Array,
    w1: Any,
    w3: Any,
    w2: Any,
    routing: Routing,
    *,
    limit: float,
    activations: QuantFormat | None = None,
) -> jax.Array:
    """The layer for tokens x [N, D]; gradients are those of the reference with tokens and hidden rows unrounded."""
    assert activations == FP8_GROUP, "unsupported_reason refuses what the kernels do not round to"
    return with_gradient(_experts, x, stored(w1), stored(w3), stored(w2), routing, limit=limit)


def _experts(x: jax.Array, w1: Any, w3: Any, w2: Any, routing: Routing, *, limit: float) -> jax.Array:
    from pallas_kernels.grouped_matmul import kernel_sm90  # Pallas is slow to import

    tiling = _tiling(x, w1, routing)
    assert tiling is not None, "unsupported_reason refuses what no tiling fits"
    how = {"rows": tiling.rows, "gate_up": tiling.gate_up, "down": tiling.down}
    return kernel_sm90.experts(x, w1, w3, w2, routing, limit=limit, **how)


def _tiling(x: jax.Array, w1: Any, routing: Routing) -> LayerTiling | None:
    (tokens, top), (count, i, d) = routing.experts.shape, w1.shape
    return layer_tiling(tokens, top, count, d, i, x.dtype)


def layer_tiling(tokens: int, top: int, experts: int, d: int, i: int, dtype: DTypeLike) -> LayerTiling | None:
    """By the rows that an expert has on average, as measured; in float32, which is not for speed, one that always fits.

    Tables are of bfloat16. The kernel for few rows writes no float32 on a GPU, and tiles of float32 on their way out
    take as much more shared memory as one buffer less leaves.
    """
    if dtype != jnp.float32:
        return tilings.layer_tiling(tokens, top, experts, d, i)
    part = functools.partial(Problem, tokens * top, experts=experts, rows=FLOAT32_ROWS)
    gate_up, down = default_many_rows(part(i, d, weights=2)), default_many_rows(part(d, i))
    if gate_up is None or down is None:
        return None
    gate_up, down = (dataclasses.replace(tiling, stages=tiling.stages - 1) for tiling in (gate_up, down))
    return LayerTiling(FLOAT32_ROWS, gate_up, down)

"""A layer of experts for one token on Hopper, behind its router, in two launches.

Gate and up, SwiGLU and the routing weight are one, from x to the hidden rows in bfloat16; down and the sum over experts
are the other. Both quantise their input themselves (one_token_sm90.py, fp4_one_token_sm90.py), as the layer in blocks
of rows (kernel_sm90.py) does in launches between. Sums over experts are float32 throughout, not of rows in bfloat16,
and so not bit for bit those of the same token among others: the batch-invariant mode stays with the other layer.

Bound: the weights of its experts / 3.35 TB/s. On an H200 (4.8 TB/s), six of 256 experts [2048, 4096]: 41.6 us, 76 % of
the limit and 0.95 of both products alone, which have x quantised and write every expert's row; MXFP4 29.0, 58 %, 0.96.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.formats import FP8_GROUP, QuantFormat
from pallas_kernels.grouped_matmul import fp4_one_token_sm90, one_token_sm90
from pallas_kernels.grouped_matmul.activate import activate
from pallas_kernels.grouped_matmul.one_token_tiling import Mxfp4Token, OneToken
from pallas_kernels.grouped_matmul.one_token_work_sm90 import Work
from pallas_kernels.mosaic.scales import scale_bytes
from pallas_kernels.quant import QuantTensor
from pallas_kernels.router import Routing


def experts(
    x: jax.Array,
    w1: QuantTensor,
    w3: QuantTensor,
    w2: QuantTensor,
    routing: Routing,
    *,
    limit: float,
    tiling: OneToken,
    activations: QuantFormat = FP8_GROUP,
) -> jax.Array:
    """As kernel_sm90.experts, for x bfloat16 [1, D]."""
    chosen = routing.experts.reshape(-1).astype(jnp.int32)
    factors = routing.weights.reshape(-1).astype(jnp.float32)

    def product(rows: jax.Array, weights: Any, cut: Any, **how: Any) -> jax.Array:
        work = Work(rows, chosen, [(w.values, scale_bytes(w.scale)) for w in weights], activations, **how)
        if isinstance(cut, Mxfp4Token):
            return fp4_one_token_sm90.product(work, cut)
        return one_token_sm90.product(work, cut)

    how: dict[str, Any] = {"factors": factors, "epilogue": functools.partial(activate, limit=limit, across=1)}
    hidden = product(x, (w1, w3), tiling.gate_up, added=False, **how)
    return product(hidden, (w2,), tiling.down, added=True)

"""How sub-layers read and write the residual: hyper-connections over n streams, or one plain stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from dsv4.config import Execution, ModelConfig
from dsv4.model.layers import RMSNorm, declare, read
from dsv4.parameters import SpecTree
from pallas_kernels import hyper_connection
from pallas_kernels.formats import FP8_GROUP
from pallas_kernels.quant import QuantTensor


def declare_hyper(module: nnx.Module, specs: SpecTree, part: str) -> None:
    """Adds `hc_<part>_fn`, `_base` and `_scale` to `module` where the config has hyper-connections."""
    for name in ("fn", "base", "scale"):
        key = f"hc_{part}_{name}"
        if key in specs:
            setattr(module, key, declare(specs[key]))


def _coefficients(module: nnx.Module, part: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    fn, base, scale = (read(getattr(module, f"hc_{part}_{name}")) for name in ("fn", "base", "scale"))
    return fn, base, scale


def connect(
    module: nnx.Module,
    part: str,
    norm: RMSNorm,
    streams: jax.Array,
    sublayer: Callable[[jax.Array, QuantTensor | None], tuple[jax.Array, Any]],
    config: ModelConfig,
    execution: Execution,
) -> tuple[jax.Array, jax.Array, Any]:
    """streams [B, T, n, D] through one sub-layer: (new streams, the sub-layer's output, whatever else it returned).

    The sub-layer is given its input [B, T, D], and that as codes [B * T, D] where they are at hand.
    """
    residual = config.residual
    if residual.kind == "plain":
        out, extra = sublayer(norm(streams[..., 0, :]), None)
        return streams + out[..., None, :], out, extra
    arguments = streams, *_coefficients(module, part), read(norm.weight)
    how: dict[str, Any] = {
        "iterations": residual.sinkhorn_iterations,
        "eps": residual.eps,
        "norm_eps": config.norm_eps,
        "implementation": execution.implementation,
    }
    codes = None
    if execution.activations == FP8_GROUP:
        x, codes, mix = hyper_connection.pre_quantize_rows(*arguments, **how)
    else:
        x, mix = hyper_connection.pre(*arguments, **how)
    out, extra = sublayer(x, codes)
    return hyper_connection.post(streams, out, mix, implementation=execution.implementation), out, extra


def collapse(module: nnx.Module, streams: jax.Array, config: ModelConfig, execution: Execution) -> jax.Array:
    """The single vector [B, T, D] that the last norm and the head read."""
    if config.residual.kind == "plain":
        return streams[..., 0, :]
    return hyper_connection.head(
        streams, *_coefficients(module, "head"),
        eps=config.residual.eps, norm_eps=config.norm_eps, implementation=execution.implementation,
    )  # fmt: skip

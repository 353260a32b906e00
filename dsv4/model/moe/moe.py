"""The mixture-of-experts sub-layer: a router, the experts that a token takes, and the shared one that all take."""

from __future__ import annotations

from typing import NamedTuple

import jax
from flax import nnx

from dsv4.config import Execution, ModelConfig
from dsv4.model.layers import declare, read
from dsv4.model.moe.experts import RoutedExperts, SharedExpert
from dsv4.parameters import SpecTree
from pallas_kernels.quant import QuantTensor
from pallas_kernels.router import Routing, router


class MoETrace(NamedTuple):
    """experts int32 [B, T, k] and their weights float32; scores float32 [B, T, E] before the bias."""

    experts: jax.Array
    weights: jax.Array
    scores: jax.Array


class Gate(nnx.Module):
    """Router parameters: a score matrix, and either a table of token ids or a selection bias."""

    def __init__(self, specs: SpecTree):
        self.weight = declare(specs["weight"])
        self.bias = declare(specs["bias"]) if "bias" in specs else None
        self.tid2eid = declare(specs["tid2eid"]) if "tid2eid" in specs else None


class MoE(nnx.Module):
    def __init__(self, specs: SpecTree, config: ModelConfig, execution: Execution):
        m = config.moe
        self.config, self.execution = m, execution
        self.gate = Gate(specs["gate"]) if m.experts else None
        self.experts = RoutedExperts(specs["experts"], m.swiglu_limit) if m.experts else None
        self.shared_experts = SharedExpert(specs["shared_experts"], m.swiglu_limit) if m.shared else None

    def __call__(
        self, x: jax.Array, ids: jax.Array, codes: QuantTensor | None = None
    ) -> tuple[jax.Array, MoETrace | None]:
        """x [B, T, D] of tokens ids [B, T] -> [B, T, D]; hash layers take their experts from the ids.

        codes: x [B * T, D] rounded, where that is known.
        """
        batch, tokens, width = x.shape
        out, trace = None, None
        if self.experts is not None:
            flat = x.reshape(-1, width)
            routing = self._route(flat, ids.reshape(-1))
            out = self.experts(flat, routing, self.execution.products).reshape(x.shape)
            trace = MoETrace(*(part.reshape(batch, tokens, -1) for part in routing[:3]))
        if self.shared_experts is not None:
            shared = self.shared_experts(x, self.execution.products, codes)
            out = shared if out is None else out + shared
        assert out is not None, "a config has routed or shared experts"
        return out, trace

    def _route(self, x: jax.Array, ids: jax.Array) -> Routing:
        assert self.gate is not None
        bias = None if self.gate.bias is None else read(self.gate.bias)
        chosen = None if self.gate.tid2eid is None else read(self.gate.tid2eid)[ids]
        m = self.config
        return router(
            x, read(self.gate.weight), bias, chosen,
            k=m.per_token, scoring=m.scoring, normalize=m.normalize, scale=m.routed_scale,
            implementation=self.execution.implementation,
        )  # fmt: skip

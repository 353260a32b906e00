"""One transformer block: attention, then mixture of experts, each inside its residual connection."""

from __future__ import annotations

from typing import NamedTuple

import jax
from flax import nnx

from dsv4.config import Execution, LayerConfig, ModelConfig
from dsv4.model.attention import Attention, AttentionTrace
from dsv4.model.cache import LayerCache
from dsv4.model.layers import RMSNorm
from dsv4.model.moe import MoE, MoETrace
from dsv4.model.residual import connect, declare_hyper
from dsv4.parameters import SpecTree
from pallas_kernels.quant import QuantTensor


class LayerTrace(NamedTuple):
    """One layer's inside: its output streams [B, T, n, D], sub-layer outputs [B, T, D], and what was chosen."""

    streams: jax.Array
    attn_out: jax.Array
    ffn_out: jax.Array
    attention: AttentionTrace
    moe: MoETrace | None


class Block(nnx.Module):
    def __init__(self, specs: SpecTree, config: ModelConfig, layer: LayerConfig, execution: Execution):
        self.config, self.execution = config, execution
        self.attn_norm = RMSNorm(specs["attn_norm"], config.norm_eps)
        self.ffn_norm = RMSNorm(specs["ffn_norm"], config.norm_eps)
        self.attn = Attention(specs["attn"], config, layer, execution)
        self.ffn = MoE(specs["ffn"], config, execution)
        declare_hyper(self, specs, "attn")
        declare_hyper(self, specs, "ffn")

    def __call__(
        self,
        streams: jax.Array,
        ids: jax.Array,
        start: jax.Array,
        count: jax.Array,
        cache: LayerCache | None,
        *,
        attend_all: bool = False,
    ) -> tuple[jax.Array, LayerCache | None, LayerTrace]:
        """streams [B, T, n, D] of tokens ids [B, T]; start, count and cache as in `Attention`."""

        def attend(
            x: jax.Array, codes: QuantTensor | None
        ) -> tuple[jax.Array, tuple[LayerCache | None, AttentionTrace]]:
            out, new_cache, trace = self.attn(x, start, count, cache, codes=codes, attend_all=attend_all)
            return out, (new_cache, trace)

        def mix_experts(x: jax.Array, codes: QuantTensor | None) -> tuple[jax.Array, MoETrace | None]:
            return self.ffn(x, ids, codes)

        with jax.named_scope("attention"):
            streams, attn_out, (cache, attention) = connect(
                self, "attn", self.attn_norm, streams, attend, self.config, self.execution
            )
        with jax.named_scope("moe"):
            streams, ffn_out, moe = connect(
                self, "ffn", self.ffn_norm, streams, mix_experts, self.config, self.execution
            )
        return streams, cache, LayerTrace(streams, attn_out, ffn_out, attention, moe)

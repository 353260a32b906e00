"""The multi-token prediction block: one window-only block that guesses the token after the next."""

from __future__ import annotations

import jax

from dsv4.config import Execution, LayerConfig, ModelConfig
from dsv4.model.block import Block, LayerTrace
from dsv4.model.cache import LayerCache
from dsv4.model.layers import Linear, RMSNorm
from dsv4.model.residual import collapse, declare_hyper
from dsv4.parameters import SpecTree


class MTPBlock(Block):
    """Embedding and head are the model's and passed in: a module tree shares nothing."""

    def __init__(self, specs: SpecTree, config: ModelConfig, execution: Execution):
        super().__init__(specs, config, LayerConfig("window"), execution)
        self.e_proj, self.h_proj = Linear(specs["e_proj"]), Linear(specs["h_proj"])
        self.enorm = RMSNorm(specs["enorm"], config.norm_eps)
        self.hnorm = RMSNorm(specs["hnorm"], config.norm_eps)
        self.norm = RMSNorm(specs["norm"], config.norm_eps)
        declare_hyper(self, specs, "head")

    def predict(
        self,
        streams: jax.Array,
        next_ids: jax.Array,
        embedded: jax.Array,
        start: jax.Array,
        count: jax.Array,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, LayerCache | None, LayerTrace]:
        """Normed hidden state [B, T, D] for the head, from streams [B, T, n, D] after the last layer.

        `embedded` [B, T, D] are the embeddings of `next_ids`, the tokens at the positions after.
        """
        how = self.execution.products
        joined = self.h_proj(self.hnorm(streams), **how) + self.e_proj(self.enorm(embedded), **how)[..., None, :]
        streams, cache, trace = self(joined, next_ids, start, count, cache)
        return self.norm(collapse(self, streams, self.config, self.execution)), cache, trace

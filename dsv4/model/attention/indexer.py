"""The indexer of CSA layers: which compressed entries each query attends to."""

from __future__ import annotations

import jax
from flax import nnx

from dsv4.config import Execution, ModelConfig
from dsv4.model.attention.compressor import Compressor
from dsv4.model.attention.select import visible
from dsv4.model.cache import CompressedCache
from dsv4.model.layers import Linear, read
from dsv4.parameters import SpecTree
from pallas_kernels.index_scores import index_scores
from pallas_kernels.quant import Rows, as_cached, encode_rows
from pallas_kernels.rotary import rotation, turn


class Indexer(nnx.Module):
    def __init__(self, specs: SpecTree, config: ModelConfig, execution: Execution):
        self.stored, self.execution = execution.cache_format.index_format(), execution
        self.wq_b = Linear(specs["wq_b"])
        self.weights_proj = Linear(specs["weights_proj"])
        self.compressor = Compressor(specs["compressor"], config.norm_eps, self.stored, execution)
        self.heads, self.head_dim = config.indexer.heads, config.indexer.head_dim

    def __call__(
        self,
        x: jax.Array,
        q_latent: jax.Array,
        position: jax.Array,
        start: jax.Array,
        count: jax.Array,
        frequencies: jax.Array,
        cache: CompressedCache | None,
        implementation: str,
    ) -> tuple[jax.Array, jax.Array | Rows, CompressedCache | None]:
        """Scores float32 [B, T, C] of every entry, the index keys [B, C, Ki] as stored, and their cache.

        Inputs are stop-gradiented: a selection is a list of integers, so the only gradient the indexer ever gets
        is that of its own loss, which must not reach the rest of the model.
        """
        x, q_latent = jax.lax.stop_gradient((x, q_latent))
        batch, tokens, _ = x.shape
        q = self.wq_b(q_latent, **self.execution.products)
        q = q.reshape(batch, tokens, self.heads, self.head_dim)
        q = turn(q, rotation(position, frequencies).shared(-2))
        weights = self.weights_proj(x, **self.execution.exact_products) * (self.head_dim * self.heads) ** -0.5
        keys, cache = self.compressor(x, start, count, frequencies, cache, implementation)
        # Rotated and rounded as the keys are; codes where kernels multiply those, numbers where gradients are wanted.
        quantised = isinstance(keys, Rows) and self.stored.quant is not None
        q = encode_rows(q, self.stored) if quantised else as_cached(q, self.stored)
        seen = visible(position, read(self.compressor.ape).shape[0])
        return index_scores(q, keys, weights, seen, implementation=implementation), keys, cache

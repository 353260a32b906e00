"""The whole model: embedding, blocks, head; and its static structure."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4.config import Execution, ModelConfig
from dsv4.model.block import Block, LayerTrace
from dsv4.model.cache import Cache
from dsv4.model.layers import Linear, RMSNorm, declare, read
from dsv4.model.mtp import MTPBlock
from dsv4.model.residual import collapse, declare_hyper
from dsv4.parameters import SpecTree, model_specs
from pallas_kernels.quant.weights import embedding_rows


class Trace(NamedTuple):
    """Everything `trace=True` shows: embedded streams [B, T, n, D], each layer, and the normed last hidden state."""

    embedded: jax.Array
    layers: tuple[LayerTrace, ...]
    hidden: jax.Array


class Embedding(nnx.Module):
    def __init__(self, specs: SpecTree):
        self.weight = declare(specs["weight"])

    def __call__(self, ids: jax.Array, dtype: Any) -> jax.Array:
        """Rows of the table; an id outside it gives NaN, never another token's row."""
        table = read(self.weight)
        known = (ids >= 0) & (ids < table.shape[0])
        rows = embedding_rows(table, jnp.where(known, ids, 0), dtype)
        return jnp.where(known[..., None], rows, jnp.nan)


class Transformer(nnx.Module):
    def __init__(self, config: ModelConfig, execution: Execution):
        specs = model_specs(config)
        self.config, self.execution = config, execution
        self.embed = Embedding(specs["embed"])
        self.layers = nnx.List(
            [Block(specs["layers"][i], config, layer, execution) for i, layer in enumerate(config.layers)]
        )
        self.norm = RMSNorm(specs["norm"], config.norm_eps)
        self.head = Linear(specs["head"])
        declare_hyper(self, specs, "head")
        if config.mtp_blocks:
            self.mtp = nnx.List([MTPBlock(specs["mtp"][i], config, execution) for i in range(config.mtp_blocks)])

    def __call__(
        self, ids: jax.Array, count: jax.Array, cache: Cache | None, *, attend_all: bool = False
    ) -> tuple[jax.Array, Cache | None, Trace]:
        """Hidden states [B, T, D] for the head, of tokens ids [B, T] of which the first count[b] are real.

        Without a cache they are whole sequences from position 0; with one they continue it.
        """
        streams = self.embed(ids, jnp.dtype(self.execution.dtype))[..., None, :]
        streams = embedded = jnp.repeat(streams, self.config.residual.streams, axis=-2)
        start = jnp.zeros_like(count) if cache is None else cache.length
        caches, traces = [], []
        for i, block in enumerate(self.layers):
            run = functools.partial(block, attend_all=attend_all)
            if self.execution.remat:
                run = jax.checkpoint(run)
            with jax.named_scope(f"layer_{i}"):
                streams, layer_cache, trace = run(
                    streams, ids, start, count, None if cache is None else cache.layers[i]
                )
            caches.append(layer_cache)
            traces.append(trace)
        hidden = self.norm(collapse(self, streams, self.config, self.execution))
        new_cache = None if cache is None else Cache(cache.length + count, tuple(caches), cache.capacity)
        return hidden, new_cache, Trace(embedded, tuple(traces), hidden)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 logits [..., V] of normed hidden states [..., D]."""
        how: Any = {"out_dtype": jnp.float32, "batch_invariant": self.execution.batch_invariant}
        return self.head(hidden.astype(jnp.float32), **how)

    def predict_next(self, streams: jax.Array, next_ids: jax.Array, block: int = 0) -> tuple[jax.Array, LayerTrace]:
        """MTP logits float32 [B, T, V] of whole sequences, and the block's trace.

        streams [B, T, n, D] after the last layer; next_ids [B, T] the tokens one position on.
        """
        batch, tokens = next_ids.shape
        start, count = jnp.zeros(batch, jnp.int32), jnp.full(batch, tokens, jnp.int32)
        embedded = self.embed(next_ids, streams.dtype)
        hidden, _, trace = self.mtp[block].predict(streams, next_ids, embedded, start, count, None)
        return self.logits(hidden), trace


@functools.lru_cache(maxsize=32)
def structure(config: ModelConfig, execution: Execution) -> Any:
    """The graphdef of a model: its modules without their parameters. Static, nothing is allocated."""
    return nnx.split(Transformer(config, execution))[0]


def bind(config: ModelConfig, execution: Execution, params: dict[Any, Any]) -> Transformer:
    """The module with its parameters in place; cheap, meant to be called inside jit."""
    return nnx.merge(structure(config, execution), params)

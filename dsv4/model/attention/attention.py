"""The attention sub-layer: low-rank queries, one shared key-value head, a window and a selection."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4.config import Execution, LayerConfig, ModelConfig
from dsv4.model.attention.compressor import Compressor
from dsv4.model.attention.index_loss import index_divergence
from dsv4.model.attention.indexer import Indexer
from dsv4.model.attention.select import Selection, select_all, select_best, visible
from dsv4.model.cache import LayerCache, read_window, window_index, write_window
from dsv4.model.layers import Linear, RMSNorm, declare, read
from dsv4.model.rope import frequencies
from dsv4.parameters import SpecTree
from pallas_kernels.block_matmul import block_diagonal_matmul
from pallas_kernels.norm import rms_norm
from pallas_kernels.quant import QuantTensor, Rows, as_cached
from pallas_kernels.ring import MAX_STEP
from pallas_kernels.rotary import Rotation, rotation, turn
from pallas_kernels.sparse_attention import sparse_attention, sparse_attention_prefill


class AttentionTrace(NamedTuple):
    """What a layer selected and stored; None where its kind has no such thing.

    selected int32 [B, T, k] entry numbers, -1 for none. entries [B, C, K], index_keys [B, C, Ki]: as a cache would
    store them, keys of a rotated format rotated.
    index_divergence float32 [B, T]: KL of the index scores to the attention itself (training's indexer loss).
    """

    selected: jax.Array | None
    entries: jax.Array | Rows | None
    index_keys: jax.Array | Rows | None
    index_divergence: jax.Array | None


class Attention(nnx.Module):
    def __init__(self, specs: SpecTree, config: ModelConfig, layer: LayerConfig, execution: Execution):
        a = config.attention
        self.config, self.layer, self.top_k = a, layer, config.indexer.top_k
        self.norm_eps, self.implementation = config.norm_eps, execution.implementation
        self.execution, stored = execution, execution.cache_format
        self.stored = stored.window_format(a)
        self.wq_a = Linear(specs["wq_a"])
        self.q_norm = RMSNorm(specs["q_norm"], config.norm_eps)
        self.wq_b = Linear(specs["wq_b"])
        self.wkv = Linear(specs["wkv"])
        self.kv_norm = RMSNorm(specs["kv_norm"], config.norm_eps)
        self.wo_a = Linear(specs["wo_a"])
        self.wo_b = Linear(specs["wo_b"])
        self.attn_sink = declare(specs["attn_sink"]) if a.sink else None
        self.compressor = (
            Compressor(specs["compressor"], config.norm_eps, stored.entry_format(a), execution)
            if layer.compressed
            else None
        )
        self.indexer = Indexer(specs["indexer"], config, execution) if layer.kind == "csa" else None

    def __call__(
        self,
        x: jax.Array,
        start: jax.Array,
        count: jax.Array,
        cache: LayerCache | None,
        *,
        codes: QuantTensor | None = None,
        attend_all: bool = False,
    ) -> tuple[jax.Array, LayerCache | None, AttentionTrace]:
        """Attends tokens x [B, T, D] at positions start[b].., of which the first count[b] are real.

        codes: x [B * T, D] rounded, where that is known. cache None: the full sequence from position 0. attend_all: CSA
        layers attend every visible entry (the dense stage of training) while the indexer still learns.
        """
        position = start[:, None] + jnp.arange(x.shape[1])[None]
        rope = frequencies(self.config, self.layer)
        forward = rotation(position, rope)
        q_latent = self.q_norm(self._project(self.wq_a, x, codes))
        q = self._queries(q_latent, forward)
        kv = self.kv_norm(self._project(self.wkv, x, codes))
        kv = turn(kv, forward)

        entries = compressed = keys = index = scores = None
        selection = None
        if self.compressor is not None:
            entries, compressed = self.compressor(
                x, start, count, rope, None if cache is None else cache.compressed, self.implementation
            )
            selection = select_all(position, self.layer.ratio)
        if self.indexer is not None:
            scores, keys, index = self.indexer(
                x,
                q_latent,
                position,
                start,
                count,
                rope,
                None if cache is None else cache.index_keys,
                self.implementation,
            )
            best = select_best(scores, self.top_k, position, self.layer.ratio, self.implementation)
            selection = selection if attend_all else best
        out, lse, window = self._attend(q, kv, start, count, cache, entries, selection, forward.inverse)
        divergence = None
        if scores is not None and isinstance(entries, jax.Array):  # a full sequence, as in training
            seen = visible(position, self.layer.ratio)
            divergence = index_divergence(q, entries, lse, self._sink(), scores, seen, self._scale)
        trace = AttentionTrace(selection and selection.indices, entries, keys, divergence)
        new_cache = None if window is None else LayerCache(window, compressed, index)
        return self._output(out), new_cache, trace

    @property
    def _scale(self) -> float:
        return self.config.head_dim**-0.5

    def _sink(self) -> jax.Array | None:
        return None if self.attn_sink is None else read(self.attn_sink)

    def _project(self, linear: Linear, x: jax.Array, codes: QuantTensor | None = None) -> jax.Array:
        return linear(x, codes=codes, **self.execution.products)

    def _queries(self, q_latent: jax.Array, forward: Rotation) -> jax.Array:
        heads, head_dim = self.config.heads, self.config.head_dim
        q = self._project(self.wq_b, q_latent)
        q = rms_norm(q.reshape(*q.shape[:2], heads, head_dim), None, self.norm_eps)
        return turn(q, forward.shared(-2))

    def _attend(
        self,
        q: jax.Array,
        kv: jax.Array,
        start: jax.Array,
        count: jax.Array,
        cache: LayerCache | None,
        entries: jax.Array | Rows | None,
        selection: Selection | None,
        back: Rotation,
    ) -> tuple[jax.Array, jax.Array, Rows | None]:
        """Output [B, T, H, K], log-sum-exp [B, T, H], and the window ring with the new tokens in it.

        The output is turned `back`: the values in it were rotated keys.
        """
        picked = (entries, selection and selection.indices, selection and selection.counts, self._sink())
        how = {"scale": self._scale, "implementation": self.implementation}
        tokens = q.shape[1]
        full = self.layer.kind == "full"
        if cache is None:
            width = tokens if full else self.config.window
            band = as_cached(kv, self.stored)
            out, lse = sparse_attention_prefill(q, band, start, *picked, width=width, **how)
            return turn(out, back.shared(-2)), lse, None
        ring = write_window(cache.window, kv, start, count)
        slots = ring.shape[1]
        width = slots - MAX_STEP + 1 if full else self.config.window
        if tokens <= MAX_STEP:
            position = start[:, None] + jnp.arange(tokens)[None]
            index = window_index(position, width, slots)
            return *sparse_attention(q, ring, index, *picked, rotation=back, **how), ring
        history = read_window(cache.window, start - (width - 1), width - 1, kv.dtype)
        real = jnp.arange(tokens)[None, :, None] < count[:, None, None]  # what pads a chunk may be NaN
        stored = as_cached(jnp.where(real, kv, 0), self.stored)  # what the cache keeps, however chunked
        band = jnp.concatenate([history, stored], axis=1)
        out, lse = sparse_attention_prefill(q, band, start, *picked, width=width, **how)
        return turn(out, back.shared(-2)), lse, ring

    def _output(self, out: jax.Array) -> jax.Array:
        """The grouped low-rank projection."""
        grouped = out.reshape(*out.shape[:2], self.config.o_groups, -1)
        low = block_diagonal_matmul(grouped, read(self.wo_a.weight), **self.execution.exact_products)
        return self._project(self.wo_b, low)

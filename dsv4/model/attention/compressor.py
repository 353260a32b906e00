"""The compressor module: projections in float32, pooling in pallas_kernels.compress."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4.config import Execution
from dsv4.model.cache import CompressedCache
from dsv4.model.layers import Linear, RMSNorm, declare, read
from dsv4.parameters import SpecTree
from pallas_kernels.compress import compress, compress_into
from pallas_kernels.quant import Rows, as_cached
from pallas_kernels.row_format import RowFormat


class Compressor(nnx.Module):
    def __init__(self, specs: SpecTree, norm_eps: float, stored: RowFormat, execution: Execution):
        """stored: how a cache keeps the entries, which is how they are seen with or without one."""
        self.stored, self.execution = stored, execution
        self.wkv = Linear(specs["wkv"])
        self.wgate = Linear(specs["wgate"])
        self.ape = declare(specs["ape"])
        self.norm = RMSNorm(specs["norm"], norm_eps)

    def __call__(
        self,
        x: jax.Array,
        start: jax.Array,
        count: jax.Array,
        frequencies: jax.Array,
        cache: CompressedCache | None,
        implementation: str,
    ) -> tuple[jax.Array | Rows, CompressedCache | None]:
        """All entries [B, C, K], as stored, that exist after tokens x [B, T, D], and the cache that holds them.

        Without a cache (full sequence) entry numbers are 0..T//m-1 and every one of them is finished.
        """
        wide = x.astype(jnp.float32)  # the released code projects and pools in float32
        how: Any = {"out_dtype": jnp.float32, "batch_invariant": self.execution.batch_invariant}
        kv, gate = self.wkv(wide, **how), self.wgate(wide, **how)
        fixed = start, count, read(self.ape), read(self.norm.weight), frequencies
        if cache is None:
            entries, _ = compress(kv, gate, None, *fixed, norm_eps=self.norm.eps)
            return as_cached(entries.values, self.stored).astype(x.dtype), None
        rows, state = compress_into(
            cache.entries, kv, gate, cache.state, *fixed, norm_eps=self.norm.eps, implementation=implementation
        )
        return rows, CompressedCache(rows, state)

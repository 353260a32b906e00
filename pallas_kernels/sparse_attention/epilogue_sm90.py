"""The end of a result in the kernel for few: denominators, the sink, the turn, the log-sum-exp, and out."""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic.launch import store_narrow
from pallas_kernels.sparse_attention import fours_sm90 as fours
from pallas_kernels.sparse_attention.convert_sm90 import HEADROOM
from pallas_kernels.sparse_attention.turn_sm90 import turned
from pallas_kernels.sparse_attention.units_sm90 import PER_ENTRY, PER_HEAD, Unit
from pallas_kernels.sparse_attention.words_sm90 import LARGEST, LOG2_E


class Whole(NamedTuple):
    """What enters where a result is all of a query's entries: sinks of heads, and what channels turn by."""

    sink_gmem: Any
    factors_gmem: Any


class Epilogue(NamedTuple):
    """Of the query and heads of `unit`: its output and log-sum-exp, [H, K] of a query and [H], of which `whole` says
    what enters. dtype: of the output, where it is not float32; it lies in device memory as float16's bits.
    """

    unit: Unit
    whole: Whole
    out_gmem: Any
    lse_gmem: Any
    dtype: Any

    def denominators(self, top: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What sums are to be multiplied by, and the log-sum-exp without the sink, float32 [64]."""
        some = total != 0
        lse2 = jnp.log2(jnp.where(some, total, 1.0)) + (finite(top) - LARGEST)
        share = jnp.where(some, 2.0**-HEADROOM / jnp.where(some, total, 1.0), 0.0)
        if self.whole.sink_gmem is not None:
            sink2 = plgpu.load(self.whole.sink_gmem.at[self.unit.heads], layout=PER_HEAD, optimized=False) * LOG2_E
            share = jnp.where(some, share / (1 + jnp.exp2(sink2 - lse2)), 0.0)  # also if the sink is NaN
        return share, jnp.where(some, lse2 / LOG2_E, -jnp.inf)

    def put_lse(self, lse: jax.Array) -> None:
        self.lse_gmem[self.unit.part, self.unit.query, self.unit.heads] = lse

    def output(self, x: jax.Array, share: jax.Array, first: Any) -> jax.Array:
        """Of sums x [64, channels] from channel `first` on."""
        x = x * lax.broadcast_in_dim(share, x.shape, [0])
        if self.whole.factors_gmem is None:
            return x
        here = pl.ds(first, x.shape[1])
        factors_gmem = self.whole.factors_gmem.at[self.unit.query, :, here]
        both = (plgpu.load(factors_gmem.at[j], layout=PER_ENTRY, optimized=False) for j in range(2))
        return turned(x, *(lax.broadcast_in_dim(y, x.shape, [1]) for y in both), plgpu.Layout.WGMMA)

    def put_all(self, sums: Sequence[jax.Array], share: jax.Array, first: Any, q_smem: Any, warpgroup: Any) -> None:
        """Of all of a warpgroup's sums, channels from `first` on.

        What is not float32 goes through the warpgroup's half of q_smem, which nobody reads, and is as wide.
        """
        each, narrow = sums[0].shape[1], self.out_gmem.dtype != jnp.float32
        for i, x in enumerate(sums):
            x = self.output(x, share, first + i * each)
            if narrow:
                bits = lax.bitcast_convert_type(x.astype(self.dtype), jnp.float16)
                q_smem[warpgroup, :, pl.ds(i * each, each)] = bits
            else:
                self._put(x, first + i * each)
        if narrow:
            columns = pl.ds(first, q_smem.shape[-1])
            out_gmem = self.out_gmem.at[self.unit.part, self.unit.query, self.unit.heads, columns]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[warpgroup], out_gmem)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _put(self, x: jax.Array, first: Any) -> None:
        """Output x [64, channels] of a part, from channel `first` on, in float32 from registers to device memory."""
        out_gmem = self.out_gmem.at[self.unit.part, self.unit.query, self.unit.heads]
        x = fours.stored(x) if out_gmem.shape[-1] % fours.CHANNELS == 0 else x
        store_narrow(out_gmem, (slice(None), pl.ds(first, x.shape[1])), x)


def finite(top: jax.Array) -> jax.Array:
    """What logits are taken relative to: their maximum, 0 where there are none."""
    return jnp.where(top == -jnp.inf, 0.0, top)

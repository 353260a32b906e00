"""What the thread blocks of a sparse attention kernel share out, and their launch, on Hopper."""

# Pallas' transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic.launch import compiler_params, sm_count
from pallas_kernels.sparse_attention.tiling import Division

HEADS = 64  # of a unit: wgmma has so many rows
PER_HEAD = plgpu.Layout.WGMMA.reduce(1)  # a vector with one element a row of an accumulator
PER_ENTRY = plgpu.Layout.WGMMA.reduce(0)  # and a column


class Unit(NamedTuple):
    """What a thread block is at: a query, a part of its entries, a slice of its channels, and of its heads."""

    query: jax.Array
    part: jax.Array
    slice: jax.Array
    heads: Any


@dataclass(frozen=True)
class Units:
    """Pairs of a query and HEADS of its `heads`, each divided."""

    queries: int
    heads: int
    width: int
    division: Division

    @classmethod
    def of(cls, q: jax.Array, division: Division) -> Units:
        """Of q [N, H, K]."""
        queries, heads, width = q.shape
        assert heads % HEADS == 0, f"{heads} heads"
        return cls(queries, heads, width, division)

    @property
    def _groups(self) -> int:
        return self.heads // HEADS

    @property
    def _count(self) -> int:
        return self.queries * self._groups * math.prod(self.division)

    @property
    def loop(self) -> dict[str, Any]:
        """Of `plgpu.nd_loop`: a persistent thread block's units."""
        return {"grid": (self._count,), "collective_axes": "sm"}

    def __getitem__(self, index: jax.Array) -> Unit:
        parts, slices = self.division
        pair, of_pair = lax.div(index, parts * slices), lax.rem(index, parts * slices)
        group, query = lax.rem(pair, self._groups), lax.div(pair, self._groups)
        return Unit(query, lax.div(of_pair, slices), lax.rem(of_pair, slices), pl.ds(group * HEADS, HEADS))

    def launch(
        self,
        kernel: Callable[..., None],
        inputs: tuple[Any, ...],
        warpgroups: int,
        scratch_types: dict[str, Any],
        out_type: Any,
        **params: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """The output [N, H, K] of type `out_type` and the log-sum-exp [N, H] that `kernel` leaves; of several parts
        those of each, and the output in float32.
        """
        parts = self.division.parts
        out, lse = plgpu.kernel(
            kernel,
            out_type=(
                jax.ShapeDtypeStruct(
                    (parts, self.queries, self.heads, self.width), out_type if parts == 1 else jnp.float32
                ),
                jax.ShapeDtypeStruct((parts, self.queries, self.heads), jnp.float32),
            ),
            grid=(min(sm_count(), self._count),),
            grid_names=("sm",),
            num_threads=warpgroups,
            thread_name="warpgroup",
            # No warpgroup reads from shared memory what it has written there, but behind a barrier. Layouts are those
            # of what comes from memory, one lane at a time: Mosaic's search for better ones does not end.
            compiler_params=compiler_params(
                approx_math=True,
                unsafe_no_auto_barriers=True,
                lowering_semantics=plgpu.LoweringSemantics.Lane,
                **params,
            ),
            scratch_types=scratch_types,
        )(*inputs)
        return (out, lse) if parts > 1 else (out[0], lse[0])


def of_bits(x: jax.Array, dtype: Any) -> jax.Array:
    """An output that passed through shared memory of another type of 16 bits, as bits; float32 as it is."""
    return x if x.dtype == jnp.float32 else lax.bitcast_convert_type(x, dtype)

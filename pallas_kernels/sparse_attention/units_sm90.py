"""What the thread blocks of a sparse attention kernel share out, and their launch, on Hopper."""

# Pallas' transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic.launch import compiler_params, sm_count

HEADS = 64  # of a unit: wgmma has so many rows


class Unit(NamedTuple):
    """What a thread block is at: a query, a split of its entries, a slice of its heads."""

    query: jax.Array
    split: jax.Array
    heads: Any


@dataclass(frozen=True)
class Units:
    """Pairs of a query and HEADS of its `heads`, each divided into `splits`."""

    queries: int
    heads: int
    width: int
    splits: int

    @classmethod
    def of(cls, q: jax.Array, splits: int) -> Units:
        """Of q [N, H, K]."""
        queries, heads, width = q.shape
        assert heads % HEADS == 0, f"{heads} heads"
        return cls(queries, heads, width, splits)

    @property
    def _groups(self) -> int:
        return self.heads // HEADS

    @property
    def _count(self) -> int:
        return self.queries * self._groups * self.splits

    @property
    def loop(self) -> dict[str, Any]:
        """Of `plgpu.nd_loop`: a persistent thread block's units."""
        return {"grid": (self._count,), "collective_axes": "sm"}

    def __getitem__(self, index: jax.Array) -> Unit:
        group, query = (
            lax.rem(lax.div(index, self.splits), self._groups),
            lax.div(index, self.splits * self._groups),
        )
        return Unit(query, lax.rem(index, self.splits), pl.ds(group * HEADS, HEADS))

    def launch(
        self,
        kernel: Callable[..., None],
        inputs: tuple[Any, ...],
        warpgroups: int,
        scratch_types: dict[str, Any],
        out_type: Any,
        **params: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """The output [N, H, K] of type `out_type` and the log-sum-exp [N, H] that `kernel` leaves; with splits those of
        each, and the output in float32.
        """
        out, lse = plgpu.kernel(
            kernel,
            out_type=(
                jax.ShapeDtypeStruct(
                    (self.splits, self.queries, self.heads, self.width), out_type if self.splits == 1 else jnp.float32
                ),
                jax.ShapeDtypeStruct((self.splits, self.queries, self.heads), jnp.float32),
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
        return (out, lse) if self.splits > 1 else (out[0], lse[0])


def of_bits(x: jax.Array, dtype: Any) -> jax.Array:
    """An output that passed through shared memory of another type of 16 bits, as bits; float32 as it is."""
    return x if x.dtype == jnp.float32 else lax.bitcast_convert_type(x, dtype)

"""What both kernels of one token's experts are given, and how their thread blocks share it out."""

# Pallas's types cannot be followed.
# pyright: reportArgumentType=false, reportAbstractUsage=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_matmul.pipeline_sm90 import BLOCK, COLUMNS, WGMMA_ROWS
from pallas_kernels.block_matmul.split_k import AXIS, Shares, clusters
from pallas_kernels.formats import QuantFormat
from pallas_kernels.grouped_matmul.one_token_tiling import ROWS
from pallas_kernels.mosaic.launch import store_narrow


class Work(NamedTuple):
    """Products of experts int32 [k] with one row [1, K] bfloat16, a row [N] for each; or one row, `added`, of [k, K].

    weights: pairs of codes and scales, each with a leading axis of experts and N behind it. form: that rows are rounded
    to. factors float32 [k]: for the epilogue, which gets the float32 sums [64, 8] of each weight, whose first column is
    the token's, and factors [8] (None without).
    """

    rows: jax.Array
    experts: jax.Array
    weights: Sequence[tuple[jax.Array, jax.Array]]
    form: QuantFormat
    added: bool
    factors: jax.Array | None = None
    epilogue: Callable[..., jax.Array] = lambda sums, factors: sums

    def cut(self, rows_each: int, depth: int, shares: int, codes: int = 1) -> Cut:
        """Into tiles of so many rows of the weights, and steps of so many columns, K divided among `shares`.

        codes: that an element of the weights holds.
        """
        (_, n, held), (terms, k) = self.weights[0][0].shape, self.rows.shape
        expected = len(self.experts) if self.added else 1, held * codes
        assert (terms, k) == expected, f"rows {(terms, k)}, not {expected}, for {len(self.experts)} experts"
        assert (n % rows_each, k % depth, terms * k // depth % shares) == (0, 0, 0), (
            f"{(n, k, terms)} by {(rows_each, depth, shares)}"
        )
        return Cut(len(self.experts) // terms, terms, n // rows_each, k // depth, shares)

    def write(self, sums: Sequence[jax.Array], factors_gmem: Any, result: Any, row: Any, y_gmem: Any) -> None:
        """64 channels of y_gmem, from `row` on: the first column of what the epilogue makes of sums [64, 8] each."""
        factor = None
        if factors_gmem is not None:
            factor = plgpu.layout_cast(lax.broadcast_in_dim(factors_gmem[result], (ROWS,), ()), COLUMNS)
        y = self.epilogue(*sums, factor)
        column = plgpu.broadcasted_iota(jnp.int32, y.shape, 1, layout=plgpu.Layout.WGMMA)
        own = jnp.sum(jnp.where(column == 0, y, 0.0), axis=1)
        store_narrow(y_gmem, (result, pl.ds(row, WGMMA_ROWS)), own.astype(jnp.bfloat16))

    def launch(self, kernel: Callable[..., None], cut: Cut, shares: Shares, warpgroups: int, scratch: Any) -> jax.Array:
        """bfloat16 [results, N] that `kernel` leaves, by `warpgroups` consumers and a producer."""
        n = self.weights[0][0].shape[1]
        y, *_ = plgpu.kernel(
            kernel,
            out_type=(jax.ShapeDtypeStruct((cut.results, n), jnp.bfloat16), *shares.outputs()),
            grid=(cut.clusters,),
            grid_names=("sm",),
            **shares.launch(),
            num_threads=warpgroups + 1,
            thread_name="warpgroup",
            scratch_types={**scratch, **shares.scratch()},
        )(
            self.rows.reshape(-1, BLOCK),
            self.experts,
            [w for w, _ in self.weights],
            [scale for _, scale in self.weights],
            self.factors,
        )
        return y


@dataclass(frozen=True)
class Cut:
    """`results` of `tiles` each, of which a tile is summed over `terms` experts' `of_term` steps, by `shares`."""

    results: int
    terms: int
    tiles: int
    of_term: int
    shares: int

    @property
    def steps(self) -> int:
        """Of a thread block."""
        return self.terms * self.of_term // self.shares

    @property
    def clusters(self) -> int:
        return clusters(self.shares, self.tiles * self.results)

    @property
    def loop(self) -> dict[str, Any]:
        """Of `plgpu.nd_loop`, over result and tile; what is carried counts steps."""
        return {"grid": (self.results, self.tiles), "collective_axes": "sm", "init_carry": jnp.int32(0)}

    @property
    def first_step(self) -> Any:
        return 0 if self.shares == 1 else lax.axis_index(AXIS) * self.steps

    def place(self, expert_gmem: Any, first_step: Any, result: Any, i: Any) -> tuple[Any, Any]:
        """Of a thread block's i-th step: which expert it is of, and which of its steps."""
        at = first_step + i
        return expert_gmem[result * self.terms + lax.div(at, self.of_term)], lax.rem(at, self.of_term)

"""Products that are added to accumulators which a loop keeps in registers, on Hopper."""

# Pallas' transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.mosaic.interpreter import is_interpreted


def add_products(sums: Sequence[jax.Array], a_smem: Any, b_smem: Any) -> list[jax.Array]:
    """sums + a @ b, in their registers; b's columns are divided among sums.

    (The interpreter has no accumulators that start with a value.)
    """

    def multiply(accumulators):
        for i, (accumulator, x) in enumerate(zip(accumulators, sums, strict=True)):
            plgpu.wgmma(accumulator, a_smem, b_smem.at[:, pl.ds(i * x.shape[1], x.shape[1])])

    def products(*accumulators):
        multiply(accumulators)
        return [accumulator[...] for accumulator in accumulators]

    if is_interpreted():
        added = pl.run_scoped(products, *(plgpu.ACC(x.shape, jnp.float32) for x in sums))
        return [x + y for x, y in zip(sums, added, strict=True)]
    return pl.run_state(multiply)([plgpu.ACC.init(x) for x in sums])  # pyright: ignore[reportReturnType]

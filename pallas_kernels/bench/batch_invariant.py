"""What it costs that a row's bits do not depend on the others: FP8 products by the tilings that add in one order.

The column of XLA has the tiling that is fastest without that promise. Right is who gives the first row the bits that
it has in a batch of another size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench import block_matmul
from pallas_kernels.bench.block_matmul import Operands
from pallas_kernels.bench.case import Bench
from pallas_kernels.block_matmul.cases import FLASH, MatmulCase
from pallas_kernels.block_matmul.tilings import dense_tiling

ROWS = (1, 128, 4096)
OTHER = {1: 129}  # rows of the other batch, 1 where it is not here
BENCH = tuple(MatmulCase(f"batch-invariant {name} m={m}", m, n, k) for m in ROWS for name, (n, k) in FLASH.items())


def benches() -> Iterator[Bench]:
    return map(bench, BENCH)


def bench(case: MatmulCase) -> Bench:
    other = OTHER.get(case.m, 1)
    free = dense_tiling(case.m, case.n, case.k)
    here, there = (dense_tiling(m, case.n, case.k, batch_invariant=True) for m in (case.m, other))
    ours, xla = {}, {}
    if free and here and there:
        ours = {str(here): lambda sets: block_matmul.run(here, case.m, sets[0])}
        xla = {f"fastest {free}": lambda sets: block_matmul.run(free, case.m, sets[0])}
    return Bench(
        op="block_matmul",
        name=case.name,
        inputs=functools.partial(inputs, case, other),
        ours=ours,
        xla=xla,
        reference=lambda sets: block_matmul.run(there, other, sets[1])[:1] if there else None,
        judge=same_bits,
        nbytes=case.m * case.k + case.n * case.k + 2 * case.m * case.n,
        flops=2 * case.m * case.n * case.k,
        shape={"m": case.m, "n": case.n, "k": case.k},
    )


def inputs(case: MatmulCase, other: int, key: jax.Array) -> tuple[Operands, Operands]:
    """The batch, and one of another size that begins alike."""
    of_x, of_w = jax.random.split(key)
    values, w = jax.random.normal(of_x, (max(case.m, other), case.k)), block_matmul.weight(case, of_w)
    return block_matmul.operands(values[: case.m], w), block_matmul.operands(values[:other], w)


def same_bits(got: Any, want: Any) -> str | None:
    different = int(
        jnp.sum(jax.lax.bitcast_convert_type(got, jnp.uint16) != jax.lax.bitcast_convert_type(want, jnp.uint16))
    )
    return f"{different} of {got.size} results have other bits in a batch of another size" if different else None

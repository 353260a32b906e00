"""Benchmarks of MXFP4 experts in decode: few FP8 rows an expert, weights read packed. No peer has such a kernel."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.bench.case import Bench, Choice
from pallas_kernels.block_matmul.fp4_sm90 import few_rows
from pallas_kernels.block_matmul.kernel_sm90 import RowBlocks
from pallas_kernels.block_matmul.tiling import FewRows
from pallas_kernels.block_matmul.tilings import Problem
from pallas_kernels.grouped_matmul.cases import EXPERTS, FLASH
from pallas_kernels.mosaic.scales import scale_bytes
from pallas_kernels.quant import FP8_GROUP, MXFP4, QuantTensor, dequantize, quantize

TRIED = {
    8: (FewRows(4, 5, 2, 208), FewRows(4, 5, 2, 160), FewRows(4, 10, 1, 208), FewRows(4, 2, 4, 104)),
    16: (FewRows(4, 4, 2, 208), FewRows(4, 4, 2, 232)),
}
CHECKED = 3  # experts whose rows are checked: the first ones


class Mxfp4Case(NamedTuple):
    """`rows` rows for each of `experts` experts [n, k], in blocks of `block`."""

    name: str
    rows: int
    n: int
    k: int
    block: int
    experts: int = EXPERTS


BENCH = tuple(
    Mxfp4Case(f"mxfp4 256x{rows} {name}", rows, n, k, block)
    for rows, block in ((3, 8), (12, 16))
    for name, (n, k) in FLASH.items()
)


def benches() -> Iterator[Bench]:
    return map(bench, BENCH)


def bench(case: Mxfp4Case) -> Bench:
    m, weight = case.experts * case.rows, case.n * case.k
    problem = Problem(m, case.n, case.k, experts=case.experts, rows=case.block)
    return Bench(
        op="grouped_matmul",
        name=case.name,
        inputs=functools.partial(inputs, case),
        shared=functools.partial(weights, case),
        ours={str(tiling): functools.partial(run, case, tiling) for tiling in TRIED[case.block]},
        choices={str(tiling): Choice("mxfp4", problem, tiling) for tiling in TRIED[case.block]},
        xla={},
        reference=functools.partial(reference, case),
        part=lambda y: y.reshape(case.experts, case.block, -1)[:CHECKED, : case.rows],
        nbytes=case.experts * (weight // 2 + weight // 32 + case.rows * (case.k + 2 * case.n)),
        flops=2 * m * weight,
        shape={"m": m, "n": case.n, "k": case.k, "experts": case.experts, "rows": case.rows},
    )


def inputs(case: Mxfp4Case, key: jax.Array) -> tuple[QuantTensor, jax.Array]:
    """x [experts x block, k] with zeros behind an expert's rows, and its scales transposed."""
    x = jax.random.normal(key, (case.experts, case.rows, case.k))
    x = quantize(jnp.pad(x, ((0, 0), (0, case.block - case.rows), (0, 0))).reshape(-1, case.k), FP8_GROUP)
    return x, scale_bytes(x.scale).T


def weights(case: Mxfp4Case, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Packed codes uint8 [experts, n, k/2], every one as likely, and scales uint8 [experts, n, k/32]."""
    of_codes, of_scales = jax.random.split(key)
    words = jax.random.bits(of_codes, (case.experts, case.n, case.k // 8), jnp.uint32)
    codes = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(case.experts, case.n, case.k // 2)
    return codes, 115 + jax.random.bits(of_scales, (case.experts, case.n, case.k // 32), jnp.uint8) % 4


def run(case: Mxfp4Case, tiling: FewRows, sets: tuple[Any, Any]) -> jax.Array:
    (x, tokens_last), pair = sets
    blocks = RowBlocks(jnp.arange(case.experts, dtype=jnp.int32), jnp.full(1, case.experts, jnp.int32))
    how: dict[str, Any] = {"rows": case.block, "out_dtype": jnp.bfloat16, "row_blocks": blocks}
    return few_rows(x.values, tokens_last, [pair], tiling, **how)


def reference(case: Mxfp4Case, sets: tuple[Any, Any]) -> jax.Array:
    (x, _), (codes, scales) = sets
    rows = dequantize(x).reshape(case.experts, case.block, -1)[:CHECKED, : case.rows]
    scale = jax.lax.bitcast_convert_type(scales[:CHECKED], jnp.float8_e8m0fnu)
    dense = dequantize(QuantTensor(codes[:CHECKED], scale, MXFP4))
    return jnp.einsum("erk,enk->ern", rows, dense, precision="highest")

"""Benchmarks of indexer scores: FP8 keys in pages that a table names in random order, all of them wanted."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.bench.case import Bench
from pallas_kernels.index_scores import reference, sm90
from pallas_kernels.index_scores.cases import BENCH, ScoreCase
from pallas_kernels.quant import Pages, Rows, encode_rows
from pallas_kernels.quant.pages import unpack_pages
from pallas_kernels.row_format import index_format

FP8 = index_format("fp8")
CHECKED = 4  # tokens of each sequence whose scores are checked: the first ones


class Operands(NamedTuple):
    q: Rows
    keys: Pages
    weights: jax.Array
    counts: jax.Array


def benches() -> Iterator[Bench]:
    return map(bench, BENCH)


def bench(case: ScoreCase) -> Bench:
    keys, pairs = case.batch * case.entries, case.batch * case.tokens * case.entries
    queries = case.batch * case.tokens * case.heads
    return Bench(
        op="index_scores",
        name=case.name,
        inputs=functools.partial(inputs, case),
        ours={"sm90": run},
        xla={"bf16": jax.jit(functools.partial(plain, case, case.tokens, jnp.bfloat16))},
        reference=jax.jit(functools.partial(plain, case, CHECKED, jnp.float32)),
        part=lambda scores: jnp.swapaxes(scores, 0, 1),
        nbytes=keys * (case.width + 4) + 4 * pairs + queries * (case.width + 8),
        flops=2 * pairs * case.heads * case.width,
        peer=("index", case.batch, case.tokens, case.entries, case.heads, case.width, case.page)
        if case.tokens <= 2 and (case.heads, case.width) == (64, 128)
        else None,
        shape={"batch": case.batch, "tokens": case.tokens, "entries": case.entries, "heads": case.heads},
    )


def inputs(case: ScoreCase, key: jax.Array) -> Operands:
    """Codes that any byte without its highest exponent bit is, none of them NaN, and scales of 2^-4 to 2^3."""
    of_q, of_codes, of_scales, of_table, of_weights = jax.random.split(key, 5)
    pages = case.batch * case.entries // case.page
    codes = jax.random.bits(of_codes, (pages, case.page * case.width), jnp.uint8) & 0xBF
    scales = jnp.exp2(jax.random.randint(of_scales, (pages, case.page), -4, 4).astype(jnp.float32))
    planes = codes, jax.lax.bitcast_convert_type(scales, jnp.uint8).reshape(pages, -1)
    table = jax.random.permutation(of_table, pages).astype(jnp.int32).reshape(case.batch, -1)
    q = jax.random.normal(of_q, (case.batch, case.tokens, case.heads, case.width))
    return Operands(
        encode_rows(q, FP8),
        Pages(jnp.concatenate(planes, axis=1), table, FP8, case.width, case.page),
        jax.random.normal(of_weights, (case.batch, case.tokens, case.heads)),
        jnp.full((case.batch, case.tokens), case.entries, jnp.int32),
    )


@jax.jit
def run(sets: Operands) -> jax.Array:
    return sm90.index_scores(*sets)


def plain(case: ScoreCase, tokens: int, dtype: jnp.dtype, sets: Operands) -> jax.Array:
    """Scores [tokens, B, C] of the first tokens by the reference, products in `dtype`."""
    rows = unpack_pages(sets.keys.pool[sets.keys.table], FP8, case.width, case.page)
    q = jax.tree.map(lambda leaf: leaf[:, :tokens], sets.q)
    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
        scores = reference.index_scores(q, rows, sets.weights[:, :tokens].astype(dtype))
    return jnp.swapaxes(scores, 0, 1)

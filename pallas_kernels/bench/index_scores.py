"""Benchmarks of indexer scores: keys in pages that a table names in random order, all of them wanted."""

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
from pallas_kernels.quant.pages import page_layout, unpack_pages
from pallas_kernels.row_format import index_format

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
    queries, stored = case.batch * case.tokens * case.heads, index_format(case.keys).nbytes(case.width)
    return Bench(
        op="index_scores",
        name=case.name,
        inputs=functools.partial(inputs, case),
        ours={"sm90": run},
        xla={"bf16": jax.jit(functools.partial(plain, case, case.tokens, jnp.bfloat16))},
        reference=jax.jit(functools.partial(plain, case, CHECKED, jnp.float32)),
        part=lambda scores: jnp.swapaxes(scores, 0, 1),
        nbytes=keys * stored + 4 * pairs + queries * (stored + 4),
        flops=2 * pairs * case.heads * case.width,
        peer=("index", case.batch, case.tokens, case.entries, case.heads, case.width, case.page)
        if case.tokens <= 2 and (case.heads, case.width, case.keys) == (64, 128, "fp8")
        else None,
        shape={"batch": case.batch, "tokens": case.tokens, "entries": case.entries, "heads": case.heads},
    )


def inputs(case: ScoreCase, key: jax.Array) -> Operands:
    """Random codes and scales, none of them NaN: FP8 scales of 2^-4 to 2^3, FP4 ones of 2^-2 to 2."""
    of_q, of_codes, of_scales, of_table, of_weights = jax.random.split(key, 5)
    form, pages = index_format(case.keys), case.batch * case.entries // case.page
    data, _ = page_layout(form, case.width)
    codes = jax.random.bits(of_codes, (pages, case.page * data), jnp.uint8)
    exponents = jax.random.randint(of_scales, (pages, case.page, form.scales(case.width)), -4, 4)
    if case.keys == "fp4":
        scales = (127 + exponents // 2).astype(jnp.uint8)
    else:
        codes = codes & 0xBF  # any byte without its highest exponent bit
        scales = jax.lax.bitcast_convert_type(jnp.exp2(exponents.astype(jnp.float32)), jnp.uint8)
    table = jax.random.permutation(of_table, pages).astype(jnp.int32).reshape(case.batch, -1)
    q = jax.random.normal(of_q, (case.batch, case.tokens, case.heads, case.width))
    return Operands(
        encode_rows(q, form),
        Pages(jnp.concatenate([codes, scales.reshape(pages, -1)], axis=1), table, form, case.width, case.page),
        jax.random.normal(of_weights, (case.batch, case.tokens, case.heads)),
        jnp.full((case.batch, case.tokens), case.entries, jnp.int32),
    )


@jax.jit
def run(sets: Operands) -> jax.Array:
    return sm90.index_scores(*sets)


def plain(case: ScoreCase, tokens: int, dtype: jnp.dtype, sets: Operands) -> jax.Array:
    """Scores [tokens, B, C] of the first tokens by the reference, products in `dtype`."""
    rows = unpack_pages(sets.keys.pool[sets.keys.table], index_format(case.keys), case.width, case.page)
    q = jax.tree.map(lambda leaf: leaf[:, :tokens], sets.q)
    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
        scores = reference.index_scores(q, rows, sets.weights[:, :tokens].astype(dtype))
    return jnp.swapaxes(scores, 0, 1)

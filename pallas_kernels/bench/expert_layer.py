"""Benchmark of a whole layer of experts: gather, gate and up, SwiGLU, quantise, down, combine; and with its router."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench.case import Bench, Choice, disagreement
from pallas_kernels.bench.operands import mxfp4_weights_of, weights_of
from pallas_kernels.block_matmul.tiling import FewRows
from pallas_kernels.grouped_matmul import one_token_tiling
from pallas_kernels.grouped_matmul.cases import LayerCase
from pallas_kernels.grouped_matmul.one_token_tiling import STEP_BLOCKS, Mxfp4Token, OneToken, TokenProduct
from pallas_kernels.grouped_matmul.reference import expert_down, expert_gate_up
from pallas_kernels.grouped_matmul.sm90 import tiled
from pallas_kernels.grouped_matmul.tiling import MOST_STAGES
from pallas_kernels.grouped_matmul.tilings import (
    BLOCK_ROWS,
    MXFP4_ROWS,
    LayerRows,
    LayerTiling,
    layer_problem,
    layer_tiling,
)
from pallas_kernels.quant import FP8_GROUP, dequantize, round_trip
from pallas_kernels.router import Routing, router
from pallas_kernels.swiglu import swiglu

CHECKED = 2  # tokens whose results are checked
DRAWS = 8  # of tokens, see `routed_inputs`
XLA_BYTES = 20_000_000_000  # of the copy of the rows for every expert that XLA makes of a ragged dot: no more are tried


def bench(case: LayerCase) -> Bench:
    """nbytes: the expected number of experts that are hit, each once."""
    m, each = case.tokens * case.top, 3 * case.d * case.i
    sizes = case.tokens, case.top, case.experts, case.d, case.i
    chosen = layer_tiling(*sizes, mxfp4=case.mxfp4)
    most = max(min(BLOCK_ROWS), 4 * m / min(m, case.experts))
    options = [rows for rows in (MXFP4_ROWS if case.mxfp4 else BLOCK_ROWS) if rows <= most]
    tilings = {rows: layer_tiling(*sizes, rows=rows, mxfp4=case.mxfp4) for rows in options}
    tried = {rows: tiling for rows, tiling in tilings.items() if isinstance(tiling, LayerTiling)}
    alone = [chosen, *_others(case, chosen)] if isinstance(chosen, OneToken) else []
    return Bench(
        op="grouped_matmul",
        name=case.name,
        inputs=functools.partial(inputs, case),
        shared=functools.partial(weights, case),
        ours={_name(tiling): functools.partial(run, case.limit, tiling) for tiling in (*alone, *tried.values())},
        choices={
            _name(tiling): Choice("mxfp4_layer" if case.mxfp4 else "layer", layer_problem(*sizes), LayerRows(rows))
            for rows, tiling in tried.items()
        },
        chosen=_name(chosen) if chosen else None,
        xla=xla(case),
        reference=functools.partial(reference, case.limit),
        # A last bit of bfloat16 in a hidden row may choose another FP8 code; it does so in few of them.
        judge=functools.partial(disagreement, relative=1e-2, elementwise=3e-2),
        nbytes=round(expected_hits(case) * each * (17 / 32 if case.mxfp4 else 1)) + 2 * 2 * case.tokens * case.d,
        flops=2 * m * each,
        shape={"tokens": case.tokens, "top": case.top, "experts": case.experts, "d": case.d, "i": case.i},
    )


def routed(case: LayerCase) -> Bench:
    """The layer as it is timed, with its router in front: scores of a random matrix, the `top` best of each token."""
    plain = bench(case)
    assert plain.usual is not None, f"no tiling fits {case}"
    return dataclasses.replace(
        plain,
        name=f"routed {case.name}",
        inputs=functools.partial(routed_inputs, case),
        ours={plain.usual: _behind_router(case.top, "auto", plain.ours[plain.usual])},
        choices={},
        xla={name: _behind_router(case.top, "reference", run) for name, run in plain.xla.items()},
        reference=_behind_router(case.top, "reference", plain.reference),
        nbytes=plain.nbytes + 4 * case.experts * case.d,
        flops=plain.flops + 2 * case.tokens * case.experts * case.d,
    )


def _behind_router(top: int, implementation: str, run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @jax.jit
    def both(sets: Any) -> Any:
        (x, matrix), weights = sets
        how = {"k": top, "scoring": "sqrtsoftplus", "normalize": True, "scale": 1.0}
        routing = router(x, matrix, None, None, **how, implementation=implementation)
        return run(((x, routing), weights))

    return both


def routed_inputs(case: LayerCase, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x bfloat16 [N, D] and the router's matrix, float32 [E, D].

    Of some draws of x, the one that hits nearest to as many experts as are to be expected: time goes by these.
    """
    of_x, of_matrix = jax.random.split(key)
    matrix = jax.random.normal(of_matrix, (case.experts, case.d)) * case.d**-0.5

    def drawn(key: jax.Array) -> jax.Array:
        return jax.random.normal(key, (case.tokens, case.d), jnp.bfloat16)

    def off(key: jax.Array) -> jax.Array:
        _, chosen = jax.lax.top_k(drawn(key) @ matrix.T.astype(jnp.bfloat16), case.top)
        hits = jnp.sum(jnp.bincount(chosen.reshape(-1), length=case.experts) > 0, dtype=jnp.float32)
        return jnp.abs(hits - expected_hits(case))

    draws = jax.random.split(of_x, DRAWS)
    return drawn(draws[jnp.argmin(jax.lax.map(off, draws))]), matrix


def expected_hits(case: LayerCase) -> float:
    return case.experts * (1 - (1 - case.top / case.experts) ** case.tokens)


def _others(case: LayerCase, chosen: OneToken) -> Iterator[OneToken]:
    """Each of its products cut in another way, in as many buffers as there is room for."""
    for part, problem in one_token_tiling.products(case.d, case.i, case.top).items():
        for tiling in _ways(case.mxfp4, problem):
            if tiling != getattr(chosen, part):
                yield dataclasses.replace(chosen, **{part: tiling})


def _ways(mxfp4: bool, problem: TokenProduct) -> Iterator[FewRows | Mxfp4Token]:
    cuts = itertools.product((1, 2, 4), (1, 2, 4) if mxfp4 else (1,), STEP_BLOCKS[:3], (1, 2, 3))
    for teams, turns, blocks, shares in cuts:
        if teams * turns > 4 or (turns > 1 and blocks != 4):
            continue
        for stages in range(MOST_STAGES - MOST_STAGES % turns, 1, -turns):
            tiling = FewRows(blocks, stages, teams, 104 if teams > 2 else 160, shares)
            if mxfp4:
                tiling = Mxfp4Token(blocks, stages, teams, turns, shares)
            if one_token_tiling.reason(tiling, problem) is None:
                yield tiling
                break


def _name(tiling: LayerTiling | OneToken) -> str:
    if isinstance(tiling, OneToken):
        return f"one token {tiling.gate_up} {tiling.down}"
    return f"rows={tiling.rows} {tiling.gate_up} {tiling.down}"


def weights(case: LayerCase, key: jax.Array) -> tuple[Any, ...]:
    """w1, w3 [E, I, D] and w2 [E, D, I]."""
    of_up, of_down = jax.random.split(key)
    made = mxfp4_weights_of if case.mxfp4 else weights_of
    up, down = (case.experts, case.i, case.d), (case.experts, case.d, case.i)
    return *made(up, 2, of_up), *made(down, 1, of_down)


def inputs(case: LayerCase, key: jax.Array) -> tuple[jax.Array, Routing]:
    """x bfloat16 [N, D] and a routing to experts that are all as likely."""
    of_x, of_experts, of_weights = jax.random.split(key, 3)
    x = jax.random.normal(of_x, (case.tokens, case.d), jnp.bfloat16)
    scores = jax.random.uniform(of_experts, (case.tokens, case.experts))
    chosen = jax.lax.top_k(scores, case.top)[1]
    factors = jax.random.uniform(of_weights, chosen.shape, minval=0.1)
    return x, routed_to(chosen, factors / jnp.sum(factors, 1, keepdims=True), scores)


def routed_to(chosen: jax.Array, weights: jax.Array, scores: jax.Array) -> Routing:
    """Of tokens whose experts [N, k] are chosen, with their weights, by scores [N, E]."""
    flat = chosen.reshape(-1)
    counts = jnp.zeros(scores.shape[1], jnp.int32).at[flat].add(1)
    return Routing(chosen, weights, scores, counts, jnp.argsort(flat, stable=True).astype(jnp.int32))


def first_of(routing: Routing, tokens: int) -> Routing:
    """The routing of the first tokens alone."""
    return routed_to(routing.experts[:tokens], routing.weights[:tokens], routing.scores[:tokens])


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(limit: float, tiling: LayerTiling | OneToken, sets: tuple[Any, Any]) -> jax.Array:
    (x, routing), weights = sets
    return tiled(x, weights, routing, tiling, limit=limit, activations=FP8_GROUP)


def xla(case: LayerCase) -> dict[str, Any]:
    rows = case.tokens * case.top
    if rows > case.experts and 2 * rows * case.experts * case.d > XLA_BYTES:
        return {}
    return {"reference": functools.partial(run_xla, case.limit)}


@functools.partial(jax.jit, static_argnums=0)
def run_xla(limit: float, sets: tuple[Any, Any]) -> jax.Array:
    (x, routing), (w1, w3, w2) = sets
    hidden = expert_gate_up(x, w1, w3, routing, limit=limit, activations=FP8_GROUP)
    return expert_down(hidden, w2, routing, activations=FP8_GROUP)


@functools.partial(jax.jit, static_argnums=0)
def reference(limit: float, sets: tuple[Any, Any]) -> jax.Array:
    """float32 [tokens that are checked, D], hidden rows rounded as between the two products."""
    (x, routing), (w1, w3, w2) = sets
    tokens = min(CHECKED, x.shape[0])
    rows = round_trip(x[:tokens].astype(jnp.float32), FP8_GROUP)

    def times(row: jax.Array, w: Any, expert: jax.Array) -> jax.Array:
        dense = dequantize(jax.tree.map(lambda leaf: leaf[expert], w))
        return jnp.matmul(row[None], dense.T, precision="highest")

    def one(choice: tuple[jax.Array, ...]) -> jax.Array:
        token, expert, factor = choice
        hidden = swiglu(times(rows[token], w1, expert), times(rows[token], w3, expert), limit) * factor
        hidden = round_trip(jax.lax.reduce_precision(hidden, 8, 7), FP8_GROUP)  # XLA would leave out two casts
        return times(hidden[0], w2, expert)[0]

    chosen, factors = routing.experts[:tokens], routing.weights[:tokens]
    token = jnp.repeat(jnp.arange(tokens), chosen.shape[1])
    out = jax.lax.map(one, (token, chosen.reshape(-1), factors.reshape(-1)))
    return jnp.sum(out.reshape(*chosen.shape, -1), axis=1)

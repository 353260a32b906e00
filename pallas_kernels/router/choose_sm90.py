"""Scores, choice and weights of many tokens on Hopper, a warp each, from terms of their logits.

A lane has some neighbouring experts. A thread block has a tile of tokens, of which its four warpgroups take 16 at a
time; each counts how often an expert is chosen in shared memory, and one adds these up.

Bound: (terms + 1) 4 E N bytes / 3.35 TB/s, and the latency of a choice for every 16 tokens of a tile. 4096 tokens of
256 experts take an H200 7.5 us, where the bytes take 3.5.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic.launch import compiler_params, store_narrow
from pallas_kernels.mosaic.warp import WARP
from pallas_kernels.mosaic.words import lanes
from pallas_kernels.router.tiling import LANES, ROUND, Tiles, padded_experts
from pallas_kernels.router.token_sm90 import Rules, clear, keys_of, scored
from pallas_kernels.router.token_warps_sm90 import (
    CHOICES,
    TOKENS,
    best_of_each,
    given_of,
    look_up,
    of_experts,
    write,
)

WARPGROUPS = ROUND // TOKENS


def choose(
    logits: jax.Array,
    bias: jax.Array | None,
    given: jax.Array | None,
    tokens: int,
    exist: int,
    rules: Rules,
    cut: Tiles,
) -> tuple[jax.Array, ...]:
    """Experts and weights [P, k], scores [P, E], and how many rows each tile has of an expert, int32 [tiles, E].

    logits [P, terms * E] and given int32 [P, k] of P tokens, a multiple of 4, of which the first `tokens` count.
    exist: experts, of which E is the next multiple of 128.
    """
    (padded, _), k, experts = logits.shape, rules.k, padded_experts(exist)
    layout = of_experts(experts)

    def kernel(
        logits_gmem, bias_gmem, given_gmem, experts_gmem, weights_gmem, scores_gmem, counts_gmem,
        *, scores_smem, bins_smem, counted,
    ):  # fmt: skip
        tile, warpgroup = lax.axis_index("tile"), lax.axis_index("warpgroup")
        scores_of, bins = scores_smem.at[warpgroup], bins_smem.at[warpgroup]
        clear(bins)
        bias_of = None
        if bias_gmem is not None:
            bias_of = plgpu.load(bias_gmem, layout=layout.reduce(0), optimized=False).astype(jnp.float32)
            bias_of = plgpu.layout_cast(lax.broadcast_in_dim(bias_of, (TOKENS, experts), [1]), layout)

        def spread(layout, of_tokens):
            columns = WARP if layout == CHOICES else experts
            return plgpu.layout_cast(lax.broadcast_in_dim(of_tokens, (TOKENS, columns), [0]), layout)

        def of_tokens(first):
            held = pl.ds(first, TOKENS)
            terms = [
                plgpu.load(logits_gmem.at[held, pl.ds(begin, experts)], layout=layout, optimized=False)
                for begin in range(0, logits.shape[1], experts)
            ]
            score = scored(sum(terms[1:], terms[0]), rules.scoring, functools.partial(spread, layout))
            store_narrow(scores_gmem, held, score)
            if given is None:
                expert = plgpu.broadcasted_iota(jnp.int32, score.shape, 1, layout=layout)
                chosen = best_of_each(keys_of(score, bias_of, expert, exist), k)
            else:
                chosen = given_of(given_gmem, first, k)
            weight = look_up(scores_of, score, chosen)
            if rules.normalize and rules.scoring != "softmax":
                slot = plgpu.broadcasted_iota(jnp.int32, weight.shape, 1, layout=CHOICES)
                total = jnp.sum(jnp.where(slot < k, weight, 0.0), axis=1)
                weight = weight / spread(CHOICES, jnp.maximum(total, 1e-20))
            write(experts_gmem, weights_gmem, bins, chosen, weight * rules.scale, first, tokens, k)

        @pl.loop(0, cut.rounds)
        def _round(i):
            first = tile * cut.tokens + (i * WARPGROUPS + warpgroup) * TOKENS
            pl.when(first < tokens)(lambda: of_tokens(first))

        plgpu.barrier_arrive(counted)

        @pl.when(warpgroup == 0)
        def _counts():
            plgpu.barrier_wait(counted)
            here = pl.ds(0, experts)
            each = [
                plgpu.load(bins_smem.at[w, here], layout=lanes(experts), optimized=False) for w in range(WARPGROUPS)
            ]
            counts_gmem[tile] = sum(each[1:], each[0])

    shapes = ((padded * k,), jnp.int32), ((padded * k,), jnp.float32), ((padded, experts), jnp.float32)
    chosen, weights, scores, counts = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(*shape) for shape in (*shapes, ((cut.count, experts), jnp.int32))],
        grid=(cut.count,),
        grid_names=("tile",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        scratch_types={
            "scores_smem": plgpu.SMEM((WARPGROUPS, TOKENS, experts), jnp.float32),
            "bins_smem": plgpu.SMEM((WARPGROUPS, experts + LANES), jnp.int32),
            "counted": plgpu.Barrier(num_arrivals=WARPGROUPS),
        },
    )(logits, bias, None if given is None else given.reshape(-1))
    return chosen.reshape(padded, k), weights.reshape(padded, k), scores, counts

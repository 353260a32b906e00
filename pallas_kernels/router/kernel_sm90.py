"""Routing of few tokens on Hopper in one launch: scores, choice, weights, counts and row order.

1. Every thread block has 64 experts and some of the columns of the router's matrix, which it reads once. float32 is
   the exact sum of three bfloat16 terms, so that three wgmmas with float32 sums, the experts as M and the tokens as N,
   multiply bfloat16 tokens in float32's precision. Its partial logits go to device memory.
2. A thread block has a token: it adds the partial logits in order, scores them, takes the k best one after another (the
   largest of integers that are ordered as the biased scores are, then the lowest expert that has it), and weighs them.
3. For each row of its token it counts the rows that sort before it, which is the row's place in the order; and for its
   share of the experts the rows they get.

Between the steps thread blocks wait for one another at a semaphore: there are no more than multiprocessors. The
simulated GPU has no semaphores, and runs three launches. A token's scores, experts and weights depend on no other.
Bound: (4 E + 2 N) D bytes / 3.35 TB/s, 1.3 us for 256 experts, and the latency of launch, two waits and k reductions:
10.5 us for one token on an H100, 13.4 for 128 (XLA 12.5 and 81).
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.block_matmul.kernel_sm90 import swizzled
from pallas_kernels.hyper_connection.tiling import TMA_ROWS
from pallas_kernels.mosaic.interpreter import INTERPRETED_SMS, is_interpreted
from pallas_kernels.mosaic.launch import H100_SMS, sm_count
from pallas_kernels.quantize_rows.kernel_sm90 import registers
from pallas_kernels.router.reference import Routing
from pallas_kernels.router.tiling import CHUNK, LANES, TILE, chunks_each, padded_experts

TERMS = {jnp.dtype(jnp.float32): 3, jnp.dtype(jnp.bfloat16): 1}  # bfloat16 terms of a weight
LEAST, LARGEST = -(2**31), 2**31 - 1


class Rules(NamedTuple):
    """What the router is told besides its arrays."""

    k: int
    scoring: str
    normalize: bool
    scale: float


def router(x: jax.Array, weight: jax.Array, bias: jax.Array | None, experts: jax.Array | None, rules: Rules) -> Routing:
    """`reference.router` of x [N, D] bfloat16 and weight [E, D] float32 or bfloat16; sm90.py has the limits."""
    exist = len(weight)
    weight, bias = filled_up(weight, bias, padded_experts(exist))
    (tokens, columns), count = x.shape, len(weight)
    chunks = chunks_each(count, columns, H100_SMS if is_interpreted() else sm_count())
    assert chunks is not None, f"a router of {weight.shape}"
    parts = columns // (CHUNK * chunks)
    blocks = count // TILE * parts
    rows = -(-tokens * rules.k // LANES) * LANES
    x = jnp.pad(x, ((0, -tokens % TMA_ROWS), (0, 0)))  # a copy of 8 rows must not reach beyond the last
    int32, float32 = jnp.int32, jnp.float32
    logits_type = jax.ShapeDtypeStruct((parts, -(-tokens // 8) * 8, count), float32)
    chosen_types = (
        jax.ShapeDtypeStruct((tokens, rules.k), int32),
        jax.ShapeDtypeStruct((tokens, rules.k), float32),
        jax.ShapeDtypeStruct((tokens, count), float32),
        jax.ShapeDtypeStruct((rows,), int32),  # the experts again, flat: their tail is not written
    )
    placed_types = jax.ShapeDtypeStruct((count,), int32), jax.ShapeDtypeStruct((tokens * rules.k,), int32)
    multiply_scratch, choose_scratch = scratch(x, weight, chunks)

    def launch(kernel: Callable[..., None], out_type: Any, blocks: int, scratch: dict[str, Any], *inputs: Any) -> Any:
        return plgpu.kernel(kernel, out_type=out_type, grid=(blocks,), grid_names=("block",), scratch_types=scratch)(
            *inputs
        )

    if is_interpreted():
        (logits,) = launch(
            lambda *refs, **scratch: multiply(*refs, **scratch, chunks=chunks),
            (logits_type,), blocks, multiply_scratch, x, weight,
        )  # fmt: skip
        *chosen, flat = launch(
            lambda *refs, **scratch: choose(*refs, **scratch, rules=rules),
            chosen_types, INTERPRETED_SMS, choose_scratch, logits, bias, experts,
        )  # fmt: skip
        placed = launch(lambda *refs: place(*refs, rules=rules), placed_types, INTERPRETED_SMS, {}, flat)
        return of_first(exist, Routing(*chosen, *placed))

    def kernel(x_gmem, weight_gmem, bias_gmem, given_gmem, *outs, terms, tokens_smem, filled, scores):
        logits_gmem, experts_gmem, weights_gmem, scores_gmem, flat_gmem, counts_gmem, order_gmem = outs
        step = pl.get_global(plgpu.SemaphoreType.REGULAR((2,)))

        def everyone(i: int) -> None:
            plgpu.semaphore_signal(step.at[i], memory_scope="gpu")
            plgpu.semaphore_wait(step.at[i], blocks, decrement=False, memory_scope="gpu")

        buffers = {"terms": terms, "tokens_smem": tokens_smem, "filled": filled}
        multiply(x_gmem, weight_gmem, logits_gmem, **buffers, chunks=chunks)
        everyone(0)
        chosen_gmem = experts_gmem, weights_gmem, scores_gmem, flat_gmem
        choose(logits_gmem, bias_gmem, given_gmem, *chosen_gmem, scores=scores, rules=rules)
        everyone(1)
        place(flat_gmem, counts_gmem, order_gmem, rules=rules)

    outs = launch(
        kernel, (logits_type, *chosen_types, *placed_types), blocks, multiply_scratch | choose_scratch,
        x, weight, bias, experts,
    )  # fmt: skip
    return of_first(exist, Routing(*outs[1:4], *outs[5:]))


def filled_up(weight: jax.Array, bias: jax.Array | None, count: int) -> tuple[jax.Array, jax.Array | None]:
    """The matrix and bias with `count` experts. Those that are added are never chosen: even where all else is as low or
    NaN, ties go to the lower expert."""
    extra = count - len(weight)
    if not extra:
        return weight, bias
    if bias is None:
        bias = jnp.zeros(len(weight), jnp.float32)
    return jnp.pad(weight, ((0, extra), (0, 0))), jnp.pad(bias, (0, extra), constant_values=-jnp.inf)


def of_first(count: int, routing: Routing) -> Routing:
    return routing._replace(scores=routing.scores[:, :count], counts=routing.counts[:count])


def scratch(x: jax.Array, weight: jax.Array, chunks: int) -> tuple[dict[str, Any], dict[str, Any]]:
    padded = -(-len(x) // 8) * 8
    return (
        {
            "terms": plgpu.SMEM((TERMS[weight.dtype], TILE, CHUNK), jnp.bfloat16, transforms=swizzled(2)),
            "tokens_smem": plgpu.SMEM((chunks, padded, CHUNK), jnp.bfloat16, transforms=swizzled(2)),
            "filled": plgpu.Barrier(num_arrivals=chunks),
        },
        {"scores": plgpu.SMEM((len(weight),), jnp.float32)},
    )


def multiply(x_gmem, weight_gmem, logits_gmem, *, terms, tokens_smem, filled, chunks: int) -> None:
    """Partial logits of 64 experts and `chunks` chunks."""
    parts, tokens, _ = logits_gmem.shape
    block = lax.axis_index("block")
    tile, part = lax.div(block, parts), lax.rem(block, parts)
    experts, layout = pl.ds(tile * TILE, TILE), registers(TILE)

    def columns(c: Any) -> Any:
        return pl.ds((part * chunks + c) * CHUNK, CHUNK)

    for c in range(chunks):  # rows behind the last token come as zeros
        plgpu.copy_gmem_to_smem(x_gmem.at[pl.ds(0, tokens), columns(c)], tokens_smem.at[c], filled)

    def of_chunk(c: Any) -> jax.Array:
        rest = plgpu.load(weight_gmem.at[experts, columns(c)], layout=layout, optimized=False)
        for term in range(terms.shape[0]):
            rounded = rest.astype(jnp.bfloat16)
            terms[term] = rounded
            rest = rest - rounded.astype(rest.dtype)
        plgpu.commit_smem()
        pl.when(c == 0)(lambda: plgpu.barrier_wait(filled))

        def product(accumulator):
            for term in reversed(range(terms.shape[0])):  # small ones first
                plgpu.wgmma(accumulator, terms.at[term], tokens_smem.at[c].T)
            return accumulator[...]

        return pl.run_scoped(product, plgpu.ACC((TILE, tokens), jnp.float32))

    sums = of_chunk(0)
    if chunks > 1:
        sums = lax.fori_loop(1, chunks, lambda c, sums: sums + of_chunk(c), sums)
    sums = plgpu.layout_cast(sums, plgpu.Layout.WGMMA_TRANSPOSED)
    logits_gmem.at[part, :, experts].T[...] = sums


def choose(
    logits_gmem, bias_gmem, given_gmem, experts_gmem, weights_gmem, scores_gmem, flat_gmem, *, scores, rules: Rules
) -> None:
    """Scores, experts and weights of the block's tokens."""
    parts, _, count = logits_gmem.shape
    layout = expert_lanes(parts)
    of_one = layout.reduce(0)

    @pl.loop(0, own(experts_gmem.shape[0]))
    def _tokens(i):
        token = lax.axis_index("block") + i * lax.axis_size("block")
        logits = jnp.sum(plgpu.load(logits_gmem.at[:, token], layout=layout, optimized=False), axis=0)
        score = scored(logits, rules.scoring)
        scores_gmem[token] = score
        scores[...] = score
        if given_gmem is None:
            biased = score
            if bias_gmem is not None:
                biased = score + plgpu.load(bias_gmem, layout=of_one, optimized=False).astype(jnp.float32)
            chosen = best(biased, rules.k, of_one)
        else:
            chosen = [given_gmem[token, j] for j in range(rules.k)]
        weights = [scores[expert] for expert in chosen]
        if rules.normalize and rules.scoring != "softmax":
            total = jnp.maximum(sum(weights[1:], weights[0]), 1e-20)
            weights = [weight / total for weight in weights]
        for j, (expert, weight) in enumerate(zip(chosen, weights, strict=True)):
            experts_gmem[token, j] = expert
            flat_gmem[token * rules.k + j] = expert
            weights_gmem[token, j] = weight * rules.scale


def best(biased: jax.Array, k: int, layout: Any) -> list[jax.Array]:
    """The experts of the k largest, ties to the lower one; NaN is the largest, as for lax.top_k."""
    count = len(biased)
    place = plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=layout)
    bits = lax.bitcast_convert_type(biased + 0.0, jnp.int32)  # one zero
    key = jnp.where(bits < 0, bits ^ LARGEST, bits)
    key = jnp.where(biased != biased, LARGEST, key)
    chosen = []
    for _ in range(k):
        expert = jnp.min(jnp.where(key == jnp.max(key), place, count))
        key = jnp.where(place == expert, LEAST, key)  # below any number's key
        chosen.append(expert)
    return chosen


def place(flat_gmem, counts_gmem, order_gmem, *, rules: Rules) -> None:
    """Where the rows of the block's tokens are when all are sorted by expert, and how many rows its experts get."""
    (rows,), k = order_gmem.shape, rules.k
    layout = plgpu.Layout.WG_STRIDED(flat_gmem.shape, vec_size=1)
    row_of = plgpu.broadcasted_iota(jnp.int32, flat_gmem.shape, 0, layout=layout)
    flat = plgpu.load(flat_gmem, layout=layout, optimized=False)
    flat = jnp.where(row_of < rows, flat, LARGEST)
    block, blocks = lax.axis_index("block"), lax.axis_size("block")

    @pl.loop(0, own(rows // k))
    def _tokens(i):
        for j in range(k):
            row = (block + i * blocks) * k + j
            expert = flat_gmem[row]
            before = (flat < expert) | ((flat == expert) & (row_of < row))
            order_gmem[jnp.sum(before.astype(jnp.int32))] = row

    @pl.loop(0, own(counts_gmem.shape[0]))
    def _experts(i):
        expert = block + i * blocks
        counts_gmem[expert] = jnp.sum((flat == expert).astype(jnp.int32))


def scored(logits: jax.Array, scoring: str) -> jax.Array:
    """`reference.router`'s scores, in what Pallas has."""
    if scoring == "softmax":
        powers = jnp.exp(logits - jnp.max(logits))
        return powers / jnp.sum(powers)
    if scoring == "sigmoid":
        return 1 / (1 + jnp.exp(-logits))
    power = jnp.exp(-jnp.abs(logits))
    sum_ = 1 + power
    # log(1 + power) without what the sum has lost.
    log1p = jnp.where(sum_ == 1, power, jnp.log(sum_) * power / jnp.where(sum_ == 1, 1.0, sum_ - 1))
    return jnp.sqrt(jnp.maximum(jnp.maximum(logits, 0) + log1p, float(np.finfo(np.float32).tiny)))


def own(count: int) -> jax.Array:
    """How many of `count` items the block has: items block, block + blocks .."""
    block, blocks = lax.axis_index("block"), lax.axis_size("block")
    return lax.div(count - block + blocks - 1, blocks)


def expert_lanes(parts: int) -> Any:
    """How a warpgroup holds [parts, experts]: four neighbours a thread; parts over as many warps as divide them."""
    warps = math.gcd(parts, 4)
    warp_dims = {4: (-3,), 2: (plgpu.Replicated(2), -3), 1: (plgpu.Replicated(4),)}[warps]
    return plgpu.Layout.TILED(plgpu.Tiling(((warps, LANES), (4,))), warp_dims, (-2,), -1)

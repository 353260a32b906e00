"""Routing of few tokens on Hopper in one launch: scores, choice, weights, counts and row order.

1. Every thread block has some experts and some of the columns of the router's matrix, which it reads once, and hands
   over its partial logits (multiply_sm90.py, words_sm90.py).
2. A thread block has a token: it adds the partial logits in order, scores them, takes the k best (choice_sm90.py),
   weighs them, and hands over which they are.
3. For each row of its token it counts the rows that sort before it, which is the row's place in the order; the first
   thread block also counts each expert's rows.

Thread blocks wait for one another's words: there are no more than multiprocessors. The simulated GPU runs one thread
block after another, and three launches. A token's scores, experts and weights depend on no other.
Bound: (4 E + 2 N) D bytes / 3.35 TB/s, 1.3 us for 256 experts, and the latency of launch, two hand-overs (one for one
token) and the choice.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.mosaic.interpreter import INTERPRETED_SMS, is_interpreted
from pallas_kernels.mosaic.launch import sm_count
from pallas_kernels.router.choice_sm90 import best, count, totals
from pallas_kernels.router.multiply_sm90 import WARPS, products, scratch_words
from pallas_kernels.router.reference import Routing
from pallas_kernels.router.tiling import LANES, MOST_CHOSEN, Share, padded_experts, share
from pallas_kernels.router.words_sm90 import lanes, of_float, publish, wait_for

LARGEST = 2**31 - 1
INTERPRETED_BLOCKS = 8  # that multiply


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
    cut = share(tokens, count, columns, INTERPRETED_BLOCKS if is_interpreted() else sm_count())
    assert cut is not None, f"a router of {weight.shape}"
    blocks = count // cut.experts * cut.parts
    int32, float32 = jnp.int32, jnp.float32
    logits_words, chosen_words = cut.parts * tokens * count, tokens * MOST_CHOSEN
    chosen_types = (
        jax.ShapeDtypeStruct((tokens, rules.k), int32),
        jax.ShapeDtypeStruct((tokens, rules.k), float32),
        jax.ShapeDtypeStruct((tokens, count), float32),
    )
    placed_types = jax.ShapeDtypeStruct((count,), int32), jax.ShapeDtypeStruct((tokens * rules.k,), int32)
    multiply_scratch, choose_scratch, place_scratch = scratch(x, weight, cut)

    def launch(kernel: Callable[..., None], out_type: Any, blocks: int, scratch: dict[str, Any], *inputs: Any) -> Any:
        return plgpu.kernel(kernel, out_type=out_type, grid=(blocks,), grid_names=("block",), scratch_types=scratch)(
            *inputs
        )

    if is_interpreted():
        (logits,) = launch(
            lambda *refs, **scratch: multiply(*refs, **scratch, cut=cut),
            (jax.ShapeDtypeStruct((logits_words,), int32),), blocks, multiply_scratch, x, weight,
        )  # fmt: skip
        *chosen, words = launch(
            lambda *refs, **scratch: each_token(tokens, lambda token: choose(token, *refs, **scratch, rules=rules)),
            (*chosen_types, jax.ShapeDtypeStruct((chosen_words,), int32)),
            INTERPRETED_SMS, choose_scratch, logits, bias, experts,
        )  # fmt: skip
        placed = launch(
            lambda *refs, **scratch: each_token(tokens, lambda token: place(token, *refs, **scratch, rules=rules)),
            placed_types, INTERPRETED_SMS, place_scratch, words,
        )  # fmt: skip
        return of_first(exist, Routing(*chosen, *placed))

    def kernel(x_gmem, weight_gmem, bias_gmem, given_gmem, *outs, sums_smem, scores_smem, keys_smem, places_smem, bins):
        *chosen_gmem, counts_gmem, order_gmem = outs
        words = pl.get_global(plgpu.SemaphoreType.REGULAR((logits_words + chosen_words,)))
        logits, handed = words.at[pl.ds(0, logits_words)], words.at[pl.ds(logits_words, chosen_words)]
        multiply(x_gmem, weight_gmem, logits, sums_smem=sums_smem, cut=cut)

        def choose_one(token: Any) -> list[jax.Array]:
            buffers = {"scores_smem": scores_smem, "keys_smem": keys_smem}
            return choose(token, logits, bias_gmem, given_gmem, *chosen_gmem, handed, **buffers, rules=rules)

        def place_one(token: Any, chosen: list[jax.Array] | None = None) -> None:
            buffers = {"places_smem": places_smem, "bins": bins}
            place(token, handed, counts_gmem, order_gmem, **buffers, rules=rules, chosen=chosen)

        if tokens <= blocks:
            each_token(tokens, lambda token: place_one(token, choose_one(token)))
        else:
            each_token(tokens, choose_one)
            each_token(tokens, place_one)

    outs = launch(
        kernel, (*chosen_types, *placed_types), blocks, multiply_scratch | choose_scratch | place_scratch,
        x, weight, bias, experts,
    )  # fmt: skip
    return of_first(exist, Routing(*outs))


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


def scratch(x: jax.Array, weight: jax.Array, cut: Share) -> tuple[dict[str, Any], ...]:
    (tokens, columns), count = x.shape, len(weight)
    words = scratch_words(tokens, columns // cut.parts // cut.chunks, cut.experts, weight.dtype.itemsize)
    return (
        {"sums_smem": plgpu.SMEM((words,), jnp.float32)},
        {"scores_smem": plgpu.SMEM((count,), jnp.float32), "keys_smem": plgpu.SMEM((count,), jnp.int32)},
        {"places_smem": plgpu.SMEM((WARPS, MOST_CHOSEN), jnp.int32), "bins": plgpu.SMEM((count,), jnp.int32)},
    )


def multiply(x_gmem, weight_gmem, words_gmem, *, sums_smem, cut: Share) -> None:
    """Hands over partial logits of the block's experts and columns."""
    (tokens, columns), count = x_gmem.shape, weight_gmem.shape[0]
    block = lax.axis_index("block")
    tile, part = lax.div(block, cut.parts), lax.rem(block, cut.parts)
    width = columns // cut.parts // cut.chunks

    def of_chunk(c: Any) -> jax.Array:
        chosen = pl.ds((part * cut.chunks + c) * width, width)
        return products(x_gmem.at[:, chosen], weight_gmem.at[pl.ds(tile * cut.experts, cut.experts), chosen], sums_smem)

    logits = of_chunk(0)
    if cut.chunks > 1:
        logits = lax.fori_loop(1, cut.chunks, lambda c, logits: logits + of_chunk(c), logits)
    start = part * (tokens * count) + tile * cut.experts
    publish(words_gmem, start, count, of_float(logits), (tokens, cut.experts))


def each_token(tokens: int, of_one: Callable[[Any], Any]) -> None:
    """Calls `of_one` with each of the block's tokens."""
    block, blocks = lax.axis_index("block"), lax.axis_size("block")
    if tokens <= blocks:
        pl.when(block < tokens)(lambda: ignore(of_one(block)))
    else:
        pl.loop(0, lax.div(tokens - block + blocks - 1, blocks))(lambda i: ignore(of_one(block + i * blocks)))


def ignore(result: Any) -> None:
    del result


def choose(
    token, logits_words, bias_gmem, given_gmem, experts_gmem, weights_gmem, scores_gmem, chosen_words,
    *, scores_smem, keys_smem, rules: Rules,
) -> list[jax.Array]:  # fmt: skip
    """Scores, experts and weights of a token."""
    tokens, count = scores_gmem.shape
    layout = lanes(count)
    parts = logits_words.shape[0] // (tokens * count)
    expert = plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=layout)
    bias = None if bias_gmem is None else plgpu.load(bias_gmem, layout=layout, optimized=False).astype(jnp.float32)
    given = None if given_gmem is None else [given_gmem[token, j] for j in range(rules.k)]
    found = wait_for(logits_words, [expert + (part * tokens + token) * count for part in range(parts)])
    partial = [lax.bitcast_convert_type(words, jnp.float32) for words in found]
    score = scored(sum(partial[1:], partial[0]), rules.scoring)
    scores_smem[...] = score
    if given is None:
        keys_smem[...] = ordered(score if bias is None else score + bias)
        chosen = best(keys_smem, rules.k)
    else:
        chosen = given
    if tokens > 1 or is_interpreted():
        slot = plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=lanes(LANES))
        words = jnp.full((LANES,), 1, jnp.int32)
        for j, one in enumerate(chosen):
            words = jnp.where(slot == j, one + 1, words)
        publish(chosen_words, token * MOST_CHOSEN, 0, words, (1, MOST_CHOSEN))
    scores_gmem[token] = score
    weights = [scores_smem[one] for one in chosen]
    if rules.normalize and rules.scoring != "softmax":
        total = jnp.maximum(sum(weights[1:], weights[0]), 1e-20)
        weights = [weight / total for weight in weights]
    for j, (one, weight) in enumerate(zip(chosen, weights, strict=True)):
        experts_gmem[token, j] = one
        weights_gmem[token, j] = weight * rules.scale
    return chosen


def ordered(x: jax.Array) -> jax.Array:
    """Integers that are ordered as x is, NaN the largest as for lax.top_k."""
    bits = lax.bitcast_convert_type(x + 0.0, jnp.int32)  # one zero
    key = jnp.where(bits < 0, bits ^ LARGEST, bits)
    return jnp.where(x != x, LARGEST, key)


def place(token, chosen_words, counts_gmem, order_gmem, *, places_smem, bins, rules: Rules, chosen=None) -> None:
    """Where the rows of a token are when all are sorted by expert; with the first token, all experts' counts.

    chosen: the token's experts; None: they are among the words. Thread t of the warpgroup has token t's experts.
    """
    k, tokens = rules.k, order_gmem.shape[0] // rules.k
    slot = plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=lanes(LANES))
    if tokens == 1 and chosen is not None:
        flat = [jnp.where(slot == 0, one, LARGEST) for one in chosen]
    else:
        first = jnp.minimum(slot, tokens - 1) * MOST_CHOSEN
        words = wait_for(chosen_words, [first + j for j in range(k)])
        flat = [jnp.where(slot < tokens, word - 1, LARGEST) for word in words]
    if chosen is None:
        own = jnp.zeros_like(slot) + token * MOST_CHOSEN
        chosen = [word - 1 for word in wait_for(chosen_words, [own + j for j in range(k)])]
    before = []
    for j, one in enumerate(chosen):
        # Of rows with the same expert those of earlier tokens come first, and earlier ones of this token.
        than = one + (slot < token).astype(jnp.int32), one + (slot <= token).astype(jnp.int32)
        before.append(sum((other < than[i < j]).astype(jnp.int32) for i, other in enumerate(flat)))
    if len(before) % 2:
        before.append(before[-1])
    pairs = totals([low + (high << 16) for low, high in zip(before[::2], before[1::2], strict=True)], places_smem)
    for j in range(k):
        order_gmem[(pairs[j // 2] >> (16 * (j % 2))) & 0xFFFF] = token * k + j

    @pl.when(token == 0)
    def _counts():
        layout = lanes(len(counts_gmem))
        bins[...] = plgpu.layout_cast(jnp.zeros(len(counts_gmem), jnp.int32), layout)
        count(bins, flat)
        counts_gmem[...] = plgpu.load(bins, layout=layout, optimized=False)


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



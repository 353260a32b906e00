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
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic.interpreter import INTERPRETED_SMS, is_interpreted
from pallas_kernels.mosaic.launch import sm_count
from pallas_kernels.router import multiply_many_sm90, multiply_sm90, words_sm90
from pallas_kernels.router.reference import Routing
from pallas_kernels.router.tiling import MOST_CHOSEN, Share, padded_experts, share
from pallas_kernels.router.token_sm90 import Rules, choose, clear, place, scratch
from pallas_kernels.router.words_sm90 import of_float, publish

INTERPRETED_BLOCKS = 8  # that multiply
ORDER = 0
ZEROED = 8  # tokens whose words come as zeros, made in a launch of their own; those of more are cleared here


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
    to_multiply, (to_choose, to_place) = multiply_scratch(x, weight, cut), scratch(count)

    def launch(kernel: Callable[..., None], out_type: Any, blocks: int, scratch: dict[str, Any], *inputs: Any) -> Any:
        return plgpu.kernel(kernel, out_type=out_type, grid=(blocks,), grid_names=("block",), scratch_types=scratch)(
            *inputs
        )

    zeroed = tokens <= ZEROED
    words_types = jax.ShapeDtypeStruct((logits_words,), int32), jax.ShapeDtypeStruct((chosen_words,), int32)
    if is_interpreted():
        (logits,) = launch(
            lambda *refs, **scratch: multiply(*refs, **scratch, cut=cut),
            words_types[:1], blocks, to_multiply, x, weight,
        )  # fmt: skip

        def choose_all(*refs: Any, **scratch: Any) -> None:
            each_token(tokens, lambda token: choose(token, *refs, **scratch, rules=rules, cut=cut))

        *chosen, words = launch(
            choose_all, (*chosen_types, words_types[1]), INTERPRETED_SMS, to_choose, logits, bias, experts
        )

        def place_all(*refs: Any, bins_smem: Any, **scratch: Any) -> None:
            clear(bins_smem)
            each_token(tokens, lambda token: place(token, *refs, bins_smem=bins_smem, **scratch, rules=rules))

        placed = launch(place_all, placed_types, INTERPRETED_SMS, to_place, words)
        return of_first(exist, Routing(*chosen, *placed))

    def kernel(x_gmem, weight_gmem, bias_gmem, given_gmem, *outs, products_smem, scores_smem, keys_smem, **of_place):
        *words, experts_gmem, weights_gmem, scores_gmem, counts_gmem, order_gmem = outs
        chosen_gmem = experts_gmem, weights_gmem, scores_gmem
        if zeroed:
            both = pl.get_global(plgpu.SemaphoreType.REGULAR((logits_words + chosen_words,)))
            words = both.at[pl.ds(0, logits_words)], both.at[pl.ds(logits_words, chosen_words)]
        logits, handed = words

        def clear_words() -> None:
            """Of a token, by who will wait for them; nobody has words before all have done so."""
            clear(of_place["bins_smem"])
            if zeroed:
                return
            cleared = pl.get_global(plgpu.SemaphoreType.REGULAR)

            def of_token(token: Any) -> None:
                words_sm90.clear(logits, token * count, tokens * count, (cut.parts, count))
                words_sm90.clear(handed, token * MOST_CHOSEN, 0, (1, MOST_CHOSEN))

            each_token(tokens, of_token)
            plgpu.semaphore_signal(cleared, memory_scope="gpu")
            plgpu.semaphore_wait(cleared, blocks, decrement=False, memory_scope="gpu")

        multiply(x_gmem, weight_gmem, logits, products_smem=products_smem, cut=cut, meanwhile=clear_words)

        def choose_one(token: Any) -> list[jax.Array]:
            buffers = {"scores_smem": scores_smem, "keys_smem": keys_smem}
            return choose(token, logits, bias_gmem, given_gmem, *chosen_gmem, handed, **buffers, rules=rules, cut=cut)

        def place_one(token: Any, chosen: list[jax.Array] | None = None) -> None:
            place(token, handed, counts_gmem, order_gmem, **of_place, rules=rules, chosen=chosen)

        if tokens <= blocks:
            each_token(tokens, lambda token: place_one(token, choose_one(token)))
        else:
            each_token(tokens, choose_one)
            each_token(tokens, place_one)

    words_types = () if zeroed else words_types
    outs = launch(
        kernel, (*words_types, *chosen_types, *placed_types), blocks, to_multiply | to_choose | to_place,
        x, weight, bias, experts,
    )  # fmt: skip
    return of_first(exist, Routing(*outs[len(words_types) :]))


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


def multiply_scratch(x: jax.Array, weight: jax.Array, cut: Share) -> dict[str, Any]:
    tokens, columns = len(x), x.shape[1] // cut.parts // cut.chunks
    if cut.many:
        words = multiply_many_sm90.scratch_words(tokens, columns, weight.dtype.itemsize)
    else:
        words = multiply_sm90.scratch_words(tokens, columns, cut.experts, weight.dtype.itemsize)
    return {"products_smem": plgpu.SMEM((words,), jnp.float32)}


def multiply(
    x_gmem, weight_gmem, words_gmem, *, products_smem, cut: Share, meanwhile: Callable[[], None] = lambda: None
) -> None:
    """Hands over partial logits of the block's experts and columns. meanwhile: done while they are loaded."""
    (tokens, columns), count = x_gmem.shape, weight_gmem.shape[0]
    block = lax.axis_index("block")
    tile, part = lax.div(block, cut.parts), lax.rem(block, cut.parts)
    width = columns // cut.parts // cut.chunks
    first = part * (tokens * count) + tile * cut.experts

    def of_chunk(c: Any) -> tuple[Any, ...]:
        chosen = pl.ds((part * cut.chunks + c) * width, width)
        return x_gmem.at[:, chosen], weight_gmem.at[pl.ds(tile * cut.experts, cut.experts), chosen], products_smem

    if ORDER:
        meanwhile()
    if cut.many:
        multiply_many_sm90.start(*of_chunk(0))
        if not ORDER:
            meanwhile()
        multiply_many_sm90.hand_over(*of_chunk(0), words_gmem, first, count)
        return

    def logits_of(c: Any) -> jax.Array:
        multiply_sm90.start(*of_chunk(c))
        return multiply_sm90.products(*of_chunk(c))

    multiply_sm90.start(*of_chunk(0))
    if not ORDER:
        meanwhile()
    logits = multiply_sm90.products(*of_chunk(0))
    if cut.chunks > 1:
        logits = lax.fori_loop(1, cut.chunks, lambda c, logits: logits + logits_of(c), logits)
    publish(words_gmem, first, count, of_float(logits), (tokens, cut.experts))


def each_token(tokens: int, of_one: Callable[[Any], Any]) -> None:
    """Calls `of_one` with each of the block's tokens."""
    block, blocks = lax.axis_index("block"), lax.axis_size("block")
    if tokens <= blocks:
        pl.when(block < tokens)(lambda: ignore(of_one(block)))
    else:
        pl.loop(0, lax.div(tokens - block + blocks - 1, blocks))(lambda i: ignore(of_one(block + i * blocks)))


def ignore(result: Any) -> None:
    del result

"""Routing of few tokens on Hopper in one launch: scores, choice, weights, counts and row order.

What one warpgroup of a thread block does:
1. It has some experts and some of the columns of the router's matrix, which it reads once, and hands over its partial
   logits (multiply_sm90.py).
2. It has a token: it adds the partial logits in order, scores them, takes the k best, weighs them, and hands over which
   they are (token_sm90.py).
3. For each row of its token it counts the rows that sort before it, which is the row's place in the order; the first
   thread block also counts each expert's rows.

What is handed over are words that are there when they are not 0 (mosaic/words.py). Few words are cleared by a launch
before. Of many, another warpgroup clears those that its thread block will wait for while the matrix is loaded, and
waits until all thread blocks have done so, which takes a semaphore, and XLA a copy for that. Thread blocks wait for one
another: there are no more than multiprocessors. The simulated GPU, which has no semaphores, runs three launches. For
the same number of tokens, a token's scores, experts and weights depend on no other; that number may decide into how
many parts K is split, and so the order of sums.

Bound: (4 E + 2 N) D bytes / 3.35 TB/s, 1.3 us for 256 experts, and the latency of launch, two hand-overs (one for one
token) and the choice. An H200 takes 5.2 us for one token and 5.8 for 8, clearing words included; of 64 and 128
tokens, 7.8 and 11.2, XLA copies the semaphore's four bytes before, 1.4 us, which is not in it.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import words
from pallas_kernels.mosaic.interpreter import INTERPRETED_SMS, is_interpreted
from pallas_kernels.mosaic.launch import compiler_params, sm_count
from pallas_kernels.mosaic.words import of_float, publish
from pallas_kernels.router import multiply_sm90
from pallas_kernels.router.reference import Routing
from pallas_kernels.router.tiling import MOST_CHOSEN, Share, padded_experts, share
from pallas_kernels.router.token_sm90 import Rules, choose, clear, filled_up, place, place_alone, scratch

INTERPRETED_BLOCKS = 8  # that multiply
MOST_ZEROS = 1 << 18  # bytes of words that a launch clears: that takes less than a semaphore's copy
CLEARS, MULTIPLIES = 1, 0  # which warpgroup


def router(x: jax.Array, weight: jax.Array, bias: jax.Array | None, experts: jax.Array | None, rules: Rules) -> Routing:
    """`reference.router` of x [N, D] bfloat16 and weight [E, D] float32 or bfloat16; sm90.py has the limits."""
    exist = len(weight)
    weight, bias = filled_up(weight, bias, padded_experts(exist))
    (tokens, columns), count = x.shape, len(weight)
    cut = share(tokens, count, columns, INTERPRETED_BLOCKS if is_interpreted() else sm_count())
    run = interpreted if is_interpreted() else launched
    routing = run(
        Plan(tokens, columns, count, exist, weight.dtype.itemsize, rules, cut, compiler_params()),
        x,
        weight,
        bias,
        experts,
    )
    return routing._replace(scores=routing.scores[:, :exist], counts=routing.counts[:exist])


@dataclass(frozen=True)
class Plan:
    """A call's sizes, and what follows from them: shapes of words, of results, and of shared memory."""

    tokens: int
    columns: int
    experts: int
    exist: int
    weight_bytes: int
    rules: Rules
    cut: Share
    compiler_params: Any

    @property
    def blocks(self) -> int:
        return self.experts // self.cut.experts * self.cut.parts

    @property
    def words(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Partial logits by part, token and expert; and what a token has chosen: twice the expert and one."""
        counts = self.cut.parts * self.tokens * self.experts, self.tokens * MOST_CHOSEN
        logits, chosen = (jax.ShapeDtypeStruct((count,), jnp.int32) for count in counts)
        return logits, chosen

    @property
    def zeroed(self) -> bool:
        """Whether words are there as zeros."""
        return 4 * self.word_count <= MOST_ZEROS

    @property
    def word_count(self) -> int:
        """All words, one behind the other, so that one launch clears them. One token's choice is handed to nobody."""
        logits, chosen = self.words
        return logits.size + chosen.size * (self.tokens > 1)

    def apart(self, both: Any) -> tuple[Any, Any]:
        """The two, of all."""
        logits, chosen = (array.size for array in self.words)
        return both.at[pl.ds(0, logits)], both.at[pl.ds(logits, chosen)] if self.tokens > 1 else None

    @property
    def chosen(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        k, tokens = self.rules.k, self.tokens
        shapes = ((tokens, k), jnp.int32), ((tokens, k), jnp.float32), ((tokens, self.experts), jnp.float32)
        return tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes)

    @property
    def placed(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        shapes = (self.experts,), (self.tokens * self.rules.k,)
        return tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes)

    @property
    def scratch(self) -> dict[str, Any]:
        columns = self.columns // self.cut.parts // self.cut.chunks
        size = multiply_sm90.scratch_words(self.tokens, columns, self.cut.experts, self.weight_bytes)
        return {"products_smem": plgpu.SMEM((size,), jnp.float32)}


def launch(kernel: Callable[..., None], out_type: Any, blocks: int, scratch: Any, *inputs: Any, **threads: Any) -> Any:
    names = {"grid": (blocks,), "grid_names": ("block",), "compiler_params": compiler_params(), **threads}
    return plgpu.kernel(kernel, out_type=out_type, scratch_types=scratch, **names)(*inputs)


@functools.partial(jax.jit, static_argnums=0)  # no array has a gradient here, and so jax does not look inside
def launched(plan: Plan, x: Any, weight: Any, bias: Any, experts: Any) -> Routing:
    """By one launch, with words that it clears or, behind one that does, gets as zeros."""
    to_choose, to_place = scratch(plan.experts)

    def kernel(
        x_gmem, weight_gmem, bias_gmem, given_gmem, *others, products_smem, scores_smem, keys_smem, cleared=None,
        **of_place,
    ):  # fmt: skip
        *of_words, experts_gmem, weights_gmem, scores_gmem, counts_gmem, order_gmem = others
        logits_words, chosen_words = of_words if len(of_words) > 1 else plan.apart(*of_words)

        def choose_one(token: Any) -> list[jax.Array]:
            outs = experts_gmem, weights_gmem, scores_gmem, chosen_words
            buffers = {"scores_smem": scores_smem, "keys_smem": keys_smem}
            how = {"rules": plan.rules, "parts": plan.cut.parts, "exist": plan.exist}
            with jax.named_scope("choose"):
                return choose(token, logits_words, bias_gmem, given_gmem, *outs, **buffers, **how)

        def place_one(token: Any, chosen: list[jax.Array] | None = None) -> None:
            with jax.named_scope("place"):
                place(token, chosen_words, counts_gmem, order_gmem, **of_place, rules=plan.rules, chosen=chosen)

        def meanwhile() -> None:
            if plan.tokens > 1:
                clear(of_place["bins_smem"])
            if cleared is not None:
                plgpu.barrier_wait(cleared)

        def routes() -> None:
            multiply(plan, x_gmem, weight_gmem, logits_words, products_smem=products_smem, meanwhile=meanwhile)
            if plan.tokens == 1:
                each_token(1, lambda token: place_alone(choose_one(token), counts_gmem, order_gmem))
            elif plan.tokens <= plan.blocks:
                each_token(plan.tokens, lambda token: place_one(token, choose_one(token)))
            else:
                each_token(plan.tokens, choose_one)
                each_token(plan.tokens, place_one)

        if plan.zeroed:
            routes()
            return

        @pl.when(lax.axis_index("warpgroup") == CLEARS)
        def _clears():
            clear_words(plan, logits_words, chosen_words)
            plgpu.barrier_arrive(cleared)

        pl.when(lax.axis_index("warpgroup") == MULTIPLIES)(routes)

    buffers, results = plan.scratch | to_choose | to_place, (*plan.chosen, *plan.placed)
    inputs, how = (x, weight, bias, experts), {"compiler_params": plan.compiler_params}
    if plan.zeroed:
        cleared = jax.new_ref(words.zeros(plan.word_count))
        return Routing(*launch(kernel, results, plan.blocks, buffers, *inputs, cleared, **how))
    how |= {"num_threads": 2, "thread_name": "warpgroup"}
    buffers |= {"cleared": plgpu.Barrier()}
    outs = launch(kernel, (*plan.words, *results), plan.blocks, buffers, *inputs, **how)
    return Routing(*outs[len(plan.words) :])


def interpreted(plan: Plan, x: Any, weight: Any, bias: Any, experts: Any) -> Routing:
    """What the simulated GPU, which has no semaphores, runs in their place: three launches."""
    (logits_words, chosen_words), (to_choose, to_place) = plan.words, scratch(plan.experts)
    (logits,) = launch(
        lambda *refs, **scratch: multiply(plan, *refs, **scratch),
        (logits_words,), plan.blocks, plan.scratch, x, weight,
    )  # fmt: skip

    def choose_all(*refs: Any, **scratch: Any) -> None:
        how = {"rules": plan.rules, "parts": plan.cut.parts, "exist": plan.exist}
        each_token(plan.tokens, lambda token: choose(token, *refs, **scratch, **how))

    def place_all(words_gmem: Any, *refs: Any, bins_smem: Any, **scratch: Any) -> None:
        if plan.tokens == 1:
            chosen = [words_gmem[j] >> 1 for j in range(plan.rules.k)]
            each_token(1, lambda _: place_alone(chosen, *refs))
            return
        clear(bins_smem)
        buffers = {"bins_smem": bins_smem, **scratch, "rules": plan.rules}
        each_token(plan.tokens, lambda token: place(token, words_gmem, *refs, **buffers))

    types = *plan.chosen, chosen_words
    *chosen, handed_over = launch(choose_all, types, INTERPRETED_SMS, to_choose, logits, bias, experts)
    placed = launch(place_all, plan.placed, INTERPRETED_SMS, to_place, handed_over)
    return Routing(*chosen, *placed)


def multiply(
    plan: Plan, x_gmem, weight_gmem, words_gmem, *, products_smem, meanwhile: Callable[[], None] = lambda: None
) -> None:
    """Hands over partial logits of the block's experts and columns. meanwhile: done while they are loaded."""
    tokens, columns, count, cut = plan.tokens, plan.columns, plan.experts, plan.cut
    block = lax.axis_index("block")
    tile, part = lax.div(block, cut.parts), lax.rem(block, cut.parts)
    width = columns // cut.parts // cut.chunks
    first = part * (tokens * count) + tile * cut.experts

    def of_chunk(c: Any) -> tuple[Any, Any, Any]:
        chosen = pl.ds((part * cut.chunks + c) * width, width)
        return x_gmem.at[:, chosen], weight_gmem.at[pl.ds(tile * cut.experts, cut.experts), chosen], products_smem

    def logits_of(c: Any) -> jax.Array:
        multiply_sm90.start(*of_chunk(c))
        return multiply_sm90.products(*of_chunk(c))

    with jax.named_scope("ask"):
        multiply_sm90.start(*of_chunk(0))
        meanwhile()
    with jax.named_scope("multiply"):
        logits = multiply_sm90.products(*of_chunk(0))
        if cut.chunks > 1:
            logits = lax.fori_loop(1, cut.chunks, lambda c, logits: logits + logits_of(c), logits)
    with jax.named_scope("hand over"):
        publish(words_gmem, first, count, of_float(logits), (tokens, cut.experts))


def clear_words(plan: Plan, logits_words, chosen_words) -> None:
    """Of the block's tokens, for which it will wait; nobody hands over words before all have done so."""
    tokens, count = plan.tokens, plan.experts
    cleared = pl.get_global(plgpu.SemaphoreType.REGULAR)

    def of_token(token: Any) -> None:
        words.clear(logits_words, token * count, tokens * count, (plan.cut.parts, count))
        words.clear(chosen_words, token * MOST_CHOSEN, 0, (1, MOST_CHOSEN))

    each_token(tokens, of_token)
    plgpu.semaphore_signal(cleared, memory_scope="gpu")
    plgpu.semaphore_wait(cleared, plan.blocks, decrement=False, memory_scope="gpu")


def each_token(tokens: int, of_one: Callable[[Any], Any]) -> None:
    """Calls `of_one` with each of the block's tokens."""
    block, blocks = lax.axis_index("block"), lax.axis_size("block")
    if tokens <= blocks:
        pl.when(block < tokens)(lambda: ignore(of_one(block)))
    else:
        pl.loop(0, lax.div(tokens - block + blocks - 1, blocks))(lambda i: ignore(of_one(block + i * blocks)))


def ignore(result: Any) -> None:
    del result

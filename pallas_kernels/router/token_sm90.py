"""What a thread block does for a token, once its logits are there: scores, choice, weights, and places of its rows."""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.warp import WARPS
from pallas_kernels.mosaic.words import lanes, publish, wait_for
from pallas_kernels.router.tiling import LANES, MOST_CHOSEN
from pallas_kernels.router.warps_sm90 import best, count, keep, sync, totals

LARGEST = 2**31 - 1


class Rules(NamedTuple):
    """What the router is told besides its arrays."""

    k: int
    scoring: str
    normalize: bool
    scale: float


def filled_up(weight: jax.Array, bias: jax.Array | None, count: int) -> tuple[jax.Array, jax.Array | None]:
    """The matrix and bias with `count` experts. Those that are added are never chosen, see `keys_of`."""
    extra = count - len(weight)
    if not extra:
        return weight, bias
    return jnp.pad(weight, ((0, extra), (0, 0))), None if bias is None else jnp.pad(bias, (0, extra))


def scratch(experts: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shared memory of `choose` and of `place`. Behind the bins there is one for rows that no token has."""
    return (
        {"scores_smem": plgpu.SMEM((experts,), jnp.float32), "keys_smem": plgpu.SMEM((experts,), jnp.int32)},
        {
            "sums_smem": plgpu.SMEM((WARPS, MOST_CHOSEN), jnp.int32),
            "bins_smem": plgpu.SMEM((experts + LANES,), jnp.int32),
        },
    )


def choose(
    token, logits_words, bias_gmem, given_gmem, experts_gmem, weights_gmem, scores_gmem, chosen_words,
    *, scores_smem, keys_smem, rules: Rules, parts: int, exist: int,
) -> list[jax.Array]:  # fmt: skip
    """Scores, experts and weights of a token. exist: experts, of which there are more where they are filled up."""
    tokens, count = scores_gmem.shape
    layout = lanes(count)
    expert = plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=layout)
    bias = None if bias_gmem is None else plgpu.load(bias_gmem, layout=layout, optimized=False).astype(jnp.float32)
    given = None if given_gmem is None else [given_gmem[token, j] for j in range(rules.k)]
    sync()
    found = wait_for(logits_words, [expert + (part * tokens + token) * count for part in range(parts)])
    partial = [lax.bitcast_convert_type(words, jnp.float32) for words in found]
    score = scored(sum(partial[1:], partial[0]), rules.scoring)
    if given is None:
        keep((scores_smem, score), (keys_smem, keys_of(score, bias, expert, exist)))
        chosen = best(keys_smem, rules.k)
    else:
        keep((scores_smem, score))
        chosen = given
    if tokens > 1 or is_interpreted():
        slot = plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=lanes(LANES))
        words = jnp.full((LANES,), 1, jnp.int32)
        for j, one in enumerate(chosen):
            words = jnp.where(slot == j, one * 2 + 1, words)
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


def keys_of(score: jax.Array, bias: jax.Array | None, expert: jax.Array, exist: int) -> jax.Array:
    """Integers that are ordered as score + bias is, NaN the largest as for lax.top_k; of no expert, the smallest.

    expert: of each element. A token that is not finite has NaN for experts that only fill up.
    """
    biased = score if bias is None else score + bias
    bits = lax.bitcast_convert_type(biased + 0.0, jnp.int32)  # one zero
    key = jnp.where(bits < 0, bits ^ LARGEST, bits)
    key = jnp.where(biased != biased, LARGEST, key)
    return key if exist == score.shape[-1] else jnp.where(expert < exist, key, -LARGEST - 1)


def place(token, chosen_words, counts_gmem, order_gmem, *, sums_smem, bins_smem, rules: Rules, chosen=None) -> None:
    """Where the rows of a token are when all are sorted by expert; with the first token, all experts' counts.

    chosen: the token's experts; None: they are among the words. Thread t of the warpgroup has token t's experts.
    """
    k, tokens = rules.k, order_gmem.shape[0] // rules.k
    slot = plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=lanes(LANES))
    first = jnp.minimum(slot, tokens - 1) * MOST_CHOSEN
    flat = [jnp.where(slot < tokens, x >> 1, LARGEST) for x in wait_for(chosen_words, [first + j for j in range(k)])]
    if chosen is None:
        own = plgpu.layout_cast(jnp.full(slot.shape, token * MOST_CHOSEN, jnp.int32), lanes(LANES))
        chosen = [word >> 1 for word in wait_for(chosen_words, [own + j for j in range(k)])]
    before = []
    for j, one in enumerate(chosen):
        # Of rows with the same expert those of earlier tokens come first, and earlier ones of this token.
        than = one + (slot < token).astype(jnp.int32), one + (slot <= token).astype(jnp.int32)
        before.append(sum((other < than[i < j]).astype(jnp.int32) for i, other in enumerate(flat)))
    if len(before) % 2:
        before.append(before[-1])
    pairs = totals([low + (high << 16) for low, high in zip(before[::2], before[1::2], strict=True)], sums_smem)
    for j in range(k):
        order_gmem[(pairs[j // 2] >> (16 * (j % 2))) & 0xFFFF] = token * k + j

    @pl.when(token == 0)
    def _counts():
        count(bins_smem, flat)
        experts = pl.ds(0, counts_gmem.shape[0])
        counts_gmem[...] = plgpu.load(bins_smem.at[experts], layout=lanes(experts.size), optimized=False)


def place_alone(chosen: list[jax.Array], counts_gmem, order_gmem) -> None:
    """`place` of the only token."""
    for j, one in enumerate(chosen):
        order_gmem[sum((other < one + int(i < j)).astype(jnp.int32) for i, other in enumerate(chosen))] = j
    expert = plgpu.broadcasted_iota(jnp.int32, counts_gmem.shape, 0, layout=lanes(*counts_gmem.shape))
    counts_gmem[...] = sum((expert == one).astype(jnp.int32) for one in chosen)


def clear(bins_smem) -> None:
    """Before rows are counted."""
    bins_smem[...] = plgpu.layout_cast(jnp.zeros(bins_smem.shape, jnp.int32), lanes(*bins_smem.shape))


def scored(logits: jax.Array, scoring: str, spread: Any = lambda x: x) -> jax.Array:
    """`reference.router`'s scores of logits [.., E], in what Pallas has. spread: [..] to all of E."""
    if scoring == "softmax":
        powers = jnp.exp(logits - spread(jnp.max(logits, axis=-1)))
        return powers / spread(jnp.sum(powers, axis=-1))
    if scoring == "sigmoid":
        return 1 / (1 + jnp.exp(-logits))
    power = jnp.exp(-jnp.abs(logits))
    sum_ = 1 + power
    # log(1 + power) without what the sum has lost.
    log1p = jnp.where(sum_ == 1, power, jnp.log(sum_) * power / jnp.where(sum_ == 1, 1.0, sum_ - 1))
    return jnp.sqrt(jnp.maximum(jnp.maximum(logits, 0) + log1p, float(np.finfo(np.float32).tiny)))

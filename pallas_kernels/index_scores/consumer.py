"""What a consumer of the Hopper kernel does with its half of an item: products of all heads, reduced to a score a key.

Products of heads stay in registers: each is clamped, multiplied by the weight of its head (a register of the thread)
and added up by its thread, then over four lanes. Of several tokens one is reduced while the next one's products run.
"""

# Pallas's transforms look abstract to the checker.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.pallas.mosaic_gpu.primitives import wgmma_accumulator_load

from pallas_kernels.index_scores import fp4_keys
from pallas_kernels.index_scores.tiling import CONSUMERS, ITEM
from pallas_kernels.mosaic import e2m1_folded as e2m1

KEYS = ITEM // CONSUMERS  # of a consumer: wgmma's rows
OF_KEYS = fp4_keys.OF_KEYS  # the layout of a vector with one element a row of an accumulator
OF_HEADS = plgpu.Layout.WGMMA.reduce(0)  # and a column
IN_FLIGHT = 2  # accumulators: tokens whose products a consumer has the tensor cores make at once

Issue = Callable[[Any, Any], None]  # accumulator [KEYS, heads] = keys times a token's queries, shared memory [heads, K]
Release = Callable[[], None]  # buffers have been read
Store = Callable[[Sequence[jax.Array]], None]  # of float32 [KEYS] for each token


class Queries(NamedTuple):
    """A unit's queries. smem: E4M3 [heads, K] of each token; factors: float32 [heads], its weights and scales.

    rows: its tokens in scale_gmem, float32 [tokens, heads], and weights_gmem. For E2M1 keys scales are [tokens, K/32,
    heads]; far_apart int32 [] is not 0 if the groups of some head have not one and the same, so that no factor will do.
    """

    smem: Sequence[Any]
    factors: Sequence[jax.Array]
    rows: Sequence[jax.Array]
    scale_gmem: Any
    weights_gmem: Any
    far_apart: Any

    @classmethod
    def load(cls, smem: Sequence[Any], rows: Sequence[jax.Array], scale_gmem: Any, weights_gmem: Any) -> Queries:
        weights = [_of_heads(weights_gmem.at[row]).astype(jnp.float32) for row in rows]
        if len(scale_gmem.shape) == 2:
            factors = [weight * _of_heads(scale_gmem.at[row]) for row, weight in zip(rows, weights, strict=True)]
            return cls(smem, factors, rows, scale_gmem, weights_gmem, None)
        factors, differ = [], []
        for row, weight in zip(rows, weights, strict=True):
            first, *others = (_of_heads(scale_gmem.at[row, group]) for group in range(scale_gmem.shape[1]))
            factors.append(weight * first * (fp4_keys.UNIT**2 * fp4_keys.BOUND))
            differ += [jnp.where(other != first, fp4_keys.SPREAD + 1, 0) for other in others]
        far_apart = fp4_keys.anywhere(functools.reduce(jnp.maximum, differ), OF_HEADS) if differ else jnp.int32(0)
        return cls(smem, factors, rows, scale_gmem, weights_gmem, far_apart)


class Fp8Keys(NamedTuple):
    """codes_smem E4M3 [KEYS, K], which wgmma reads where they are, and scale_smem float32 [KEYS]."""

    codes_smem: Any
    scale_smem: Any
    staged: Any = None

    def score(self, queries: Queries, release: Release, store: Store) -> None:
        of_keys = plgpu.load(self.scale_smem, layout=OF_KEYS, optimized=False)
        scores = _weighted(queries, lambda accumulator, q: plgpu.wgmma(accumulator, self.codes_smem, q.T), _clamped)
        release()
        store([score * of_keys for score in scores])


class Fp4Keys(NamedTuple):
    """words_smem int32 [KEYS, K/8] of packed E2M1, and scale_smem, integers [KEYS] of a byte a group."""

    words_smem: Any
    scale_smem: Any
    staged: Any = None

    def score(self, queries: Queries, release: Release, store: Store) -> None:
        width = queries.smem[0].shape[1]
        scales = plgpu.load(self.scale_smem, layout=OF_KEYS, optimized=False).astype(jnp.int32)
        far_apart = fp4_keys.far_apart(scales, width) | queries.far_apart

        @pl.when(far_apart == 0)
        def _folded():
            codes, of_keys = fp4_keys.folded(self._words(), scales, width)
            release()
            issue = lambda accumulator, q: e2m1.multiply(accumulator, codes, q.T, self.staged)  # noqa: E731
            scores = _weighted(queries, issue, fp4_keys.clamped)
            store([score * of_keys for score in scores])

        @pl.when(far_apart != 0)
        def _by_group():
            scores = [self._by_group(scales, queries, token) for token in range(len(queries.rows))]
            release()
            store(scores)

    def _words(self) -> jax.Array:
        _, words = self.words_smem.shape
        return plgpu.load(self.words_smem, layout=fp4_keys.words_layout(8 * words), optimized=False)

    def _by_group(self, scales: jax.Array, queries: Queries, token: int) -> jax.Array:
        """The scores of one token, from products of one group of channels at a time, each with its scales."""
        q_smem, row = queries.smem[token], queries.rows[token]
        heads, width = q_smem.shape

        def add(group: jax.Array, sums: jax.Array) -> jax.Array:
            codes, of_keys = fp4_keys.of_group(self._words(), scales, group, width)

            def multiply(accumulator: Any) -> jax.Array:
                e2m1.multiply(accumulator, codes, q_smem.T, self.staged)
                return wgmma_accumulator_load(accumulator, wait_n=0)

            product = pl.run_scoped(multiply, plgpu.ACC((KEYS, heads), jnp.float32))
            of_heads = _of_heads(queries.scale_gmem.at[row, group])
            scale = (lax.broadcast_in_dim(x, product.shape, [axis]) for axis, x in enumerate((of_keys, of_heads)))
            return sums + product * (next(scale) * next(scale))

        zero = plgpu.layout_cast(jnp.zeros((KEYS, heads), jnp.float32), plgpu.Layout.WGMMA)
        sums = lax.fori_loop(0, width // fp4_keys.GROUP, add, zero)
        weights = _of_heads(queries.weights_gmem.at[row]).astype(jnp.float32)
        return _sum_over_heads(_clamped(sums), weights * fp4_keys.UNIT**2)


def _weighted(queries: Queries, issue: Issue, clamp: Callable[[jax.Array], jax.Array]) -> list[jax.Array]:
    """float32 [KEYS] for each token: the sum over heads of clamped products times factors."""

    def multiply(*accumulators: Any, group: Sequence[int]) -> tuple[jax.Array, ...]:
        for accumulator, token in zip(accumulators, group, strict=True):
            issue(accumulator, queries.smem[token])
        scores = []
        for left, accumulator, token in zip(reversed(range(len(group))), accumulators, group, strict=True):
            product = wgmma_accumulator_load(accumulator, wait_n=left)
            scores.append(_sum_over_heads(clamp(product), queries.factors[token]))
        return tuple(scores)

    tokens, (heads, _) = len(queries.smem), queries.smem[0].shape
    scores = []
    for begin in range(0, tokens, IN_FLIGHT):
        group = range(begin, min(begin + IN_FLIGHT, tokens))
        fresh = [plgpu.ACC((KEYS, heads), jnp.float32)] * len(group)
        scores += pl.run_scoped(functools.partial(multiply, group=group), *fresh)
    return scores


def _clamped(product: jax.Array) -> jax.Array:
    return jnp.maximum(product, 0.0)


def _sum_over_heads(clamped: jax.Array, factors: jax.Array) -> jax.Array:
    return jnp.sum(clamped * lax.broadcast_in_dim(factors, clamped.shape, [1]), axis=1)


def _of_heads(ref: Any) -> jax.Array:
    return plgpu.load(ref, layout=OF_HEADS, optimized=False)

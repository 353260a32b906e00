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
Buffers = tuple[Any, Any]  # shared memory of codes, and of scales
Release = Callable[[], None]  # buffers have been read
Store = Callable[[Sequence[jax.Array]], None]  # of float32 [KEYS] for each token


class Fp4Queries(NamedTuple):
    """Those that FP4 keys are multiplied by. smem: E4M3 [heads, K] of each token; factor_smem float32 [heads]: its
    weights and scales; scale_smem float32 [K/32, heads]; weights_gmem [heads].

    far_apart: int32 [], not 0 if some head's groups have not one and the same scale, so that no factor will do.
    """

    smem: Sequence[Any]
    factor_smem: Sequence[Any]
    scale_smem: Sequence[Any]
    weights_gmem: Sequence[Any]
    far_apart: jax.Array

    @classmethod
    def of(
        cls, smem: Sequence[Any], factor_smem: Sequence[Any], scale_smem: Sequence[Any], weights_gmem: Sequence[Any]
    ) -> Fp4Queries:
        differ = []
        for scale in scale_smem:
            first, *others = (_of_heads(scale.at[group]) for group in range(scale.shape[0]))
            differ += [jnp.where(other != first, fp4_keys.SPREAD + 1, 0) for other in others]
        far_apart = fp4_keys.anywhere(functools.reduce(jnp.maximum, differ), OF_HEADS) if differ else jnp.int32(0)
        return cls(smem, factor_smem, scale_smem, weights_gmem, far_apart)


def unpack_queries(packed: tuple[Any, Any, Any], q_smem: Any, q_scale_smem: Any, factor_smem: Any) -> None:
    """Makes of 64 rows q_smem E4M3 [64, K], q_scale_smem float32 [K/32, 64] and factor_smem float32 [64].

    packed: E2M1 int32 [64, K/8], scales [64], integers of a byte a group, and weights [64], in memory. A row whose
    scales are near has them folded in, and the largest of them for all of its groups.
    """
    words_gmem, scale_gmem, weights_gmem = packed
    _, width = q_smem.shape
    words = plgpu.load(words_gmem, layout=fp4_keys.words_layout(width), optimized=False)
    codes, weights = (plgpu.load(x, layout=OF_KEYS, optimized=False) for x in (scale_gmem, weights_gmem))
    scales = fp4_keys.Scales.of(codes.astype(jnp.int32), width)
    near = scales.largest - jnp.min(scales.own, axis=1) <= fp4_keys.SPREAD
    q_smem[...] = fp4_keys.folded(words, scales.below * fp4_keys.per_lane(near.astype(jnp.int32)), width)
    largest = fp4_keys.scale_of(scales.largest)
    factor_smem[...] = weights.astype(jnp.float32) * largest * (fp4_keys.UNIT**2 * fp4_keys.BOUND)
    for group in range(width // fp4_keys.GROUP):
        q_scale_smem[group] = jnp.where(near, largest, fp4_keys.scale_of(scales.of_group(group)))


def fp8_factors(scale_gmem: Sequence[Any], weights_gmem: Sequence[Any]) -> list[jax.Array]:
    """float32 [heads] of each token: what its clamped products are multiplied by."""
    pairs = zip(weights_gmem, scale_gmem, strict=True)
    return [_of_heads(weights).astype(jnp.float32) * _of_heads(scale) for weights, scale in pairs]


def score_fp8(
    q_smem: Sequence[Any], factors: Sequence[jax.Array], buffers: Buffers, release: Release, store: Store
) -> None:
    """Stores float32 [KEYS] for each token, of codes E4M3 [KEYS, K], which wgmma reads where they are, and scales."""
    codes_smem, scale_smem = buffers
    of_keys = plgpu.load(scale_smem, layout=OF_KEYS, optimized=False)

    def issue(accumulator: Any, q: Any) -> None:
        plgpu.wgmma(accumulator, codes_smem, q.T)

    def reduce(product: jax.Array, token: int) -> jax.Array:
        return _sum_over_heads(_clamped(product), factors[token])

    scores = _each_token(q_smem, issue, reduce)
    plgpu.commit_smem()  # this warpgroup has read the buffers, and not only through wgmma
    release()  # before the stores: buffers are few
    store([score * of_keys for score in scores])


def score_fp4(queries: Fp4Queries, staged: Any, buffers: Buffers, release: Release, store: Store) -> None:
    """Stores float32 [KEYS] for each token, twice where scales of some key are too far apart to be folded.

    buffers: int32 [KEYS, K/8] of packed E2M1, and integers [KEYS] of a byte a group. staged: where the interpreter
    hands codes to its wgmma.
    """
    keys = _Fp4Keys(*buffers, staged)
    scales = keys.scales()
    codes = fp4_keys.folded(keys.words(), scales.below, keys.width)
    far_apart = fp4_keys.anywhere(-scales.below, fp4_keys.EACH_BLOCK) | queries.far_apart

    def issue(accumulator: Any, q: Any) -> None:
        e2m1.multiply(accumulator, codes, q.T, staged)

    def reduce(product: jax.Array, token: int) -> jax.Array:
        return _sum_over_heads(fp4_keys.clamped(product), _of_heads(queries.factor_smem[token]))

    scores = _each_token(queries.smem, issue, reduce)
    of_keys = fp4_keys.scale_of(scales.largest)
    store([score * of_keys for score in scores])

    @pl.when(far_apart != 0)
    def _again():
        store([_score_by_group(keys, queries, token) for token in range(len(queries.smem))])

    release()


class _Fp4Keys(NamedTuple):
    """What `score_fp4` has of an item."""

    words_smem: Any
    scale_smem: Any
    staged: Any

    @property
    def width(self) -> int:
        return 8 * self.words_smem.shape[1]

    def words(self) -> jax.Array:
        return plgpu.load(self.words_smem, layout=fp4_keys.words_layout(self.width), optimized=False)

    def scales(self) -> fp4_keys.Scales:
        words = plgpu.load(self.scale_smem, layout=OF_KEYS, optimized=False).astype(jnp.int32)
        return fp4_keys.Scales.of(words, self.width)


def _score_by_group(keys: _Fp4Keys, queries: Fp4Queries, token: int) -> jax.Array:
    """The scores of one token, from products of one group of channels at a time, each with its scales."""
    q_smem, scale_smem = queries.smem[token], queries.scale_smem[token]

    def add(group: jax.Array, sums: jax.Array) -> jax.Array:
        codes = fp4_keys.of_group(keys.words(), group, keys.width)

        def multiply(accumulator: Any) -> jax.Array:
            e2m1.multiply(accumulator, codes, q_smem.T, keys.staged)
            return wgmma_accumulator_load(accumulator, wait_n=0)

        product = pl.run_scoped(multiply, plgpu.ACC((KEYS, q_smem.shape[0]), jnp.float32))
        of_keys, of_heads = fp4_keys.scale_of(keys.scales().of_group(group)), _of_heads(scale_smem.at[group])
        rows, columns = (lax.broadcast_in_dim(x, product.shape, [i]) for i, x in enumerate((of_keys, of_heads)))
        return sums + product * (rows * columns)

    zero = plgpu.layout_cast(jnp.zeros((KEYS, q_smem.shape[0]), jnp.float32), plgpu.Layout.WGMMA)
    sums = lax.fori_loop(0, keys.width // fp4_keys.GROUP, add, zero)
    weights = _of_heads(queries.weights_gmem[token]).astype(jnp.float32)
    return _sum_over_heads(_clamped(sums), weights * fp4_keys.UNIT**2)


def _each_token(q_smem: Sequence[Any], issue: Issue, reduce: Callable[[jax.Array, int], jax.Array]) -> list[jax.Array]:
    """reduce(products float32 [KEYS, heads], token) for each token, one while the next one's products run."""

    def multiply(*accumulators: Any, group: Sequence[int]) -> tuple[jax.Array, ...]:
        for accumulator, token in zip(accumulators, group, strict=True):
            issue(accumulator, q_smem[token])
        scores = []
        for left, accumulator, token in zip(reversed(range(len(group))), accumulators, group, strict=True):
            scores.append(reduce(wgmma_accumulator_load(accumulator, wait_n=left), token))
        return tuple(scores)

    tokens, (heads, _) = len(q_smem), q_smem[0].shape
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

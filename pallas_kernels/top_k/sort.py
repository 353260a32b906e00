"""Pairs in order: a bitonic sort by all warpgroups of a thread block, every thread a few pairs.

Blocks of a size are in order. Of two that follow each other every pair is compared with the one as far from the other
end, and then with those half, a quarter ... of a block away: what comes first goes to the lower rank.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.top_k.team import Team, barrier
from pallas_kernels.top_k.warpgroup import SCALAR, WARP, constant, each_scalar, in_lanes, the, word

Pair = tuple[jax.Array, jax.Array]
Values = tuple[ir.Value, ...]
Step = tuple[Any, Any]  # ranks i and i ^ the first are compared, and the lower one is where the second is not set
WITHIN_WARP = [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]
WARP_IN_ORDER = [step for i in range(5) for step in ((2 ** (i + 1) - 1, 2**i), *WITHIN_WARP[5 - i :])]


def in_order(team: Team, n: int, keys_smem: Any, indices_smem: Any) -> tuple[jax.Array, Pair]:
    """Of the first n pairs in keys_smem and indices_smem, int32, larger keys first, then lower indices.

    Returns this warpgroup's ranks and pairs, each int32 [n / team.size]. n is a power of two, and there is room for
    2 n: who reads behind the n is late.
    """
    held = n // team.size
    layout = in_lanes(held)
    own = pl.ds(team.member * held, held)
    rank = team.member * held + plgpu.broadcasted_iota(jnp.int32, (held,), 0, layout=layout)
    pair = tuple(plgpu.load(x.at[own], layout=layout, optimized=False) for x in (keys_smem, indices_smem))

    def merged(state: Any) -> Any:
        size, turn, *pair = state

        def step(state: Any) -> Any:
            mask, bit, turn, *pair = state
            smem = tuple(x.at[pl.ds(turn * n, n)] for x in (keys_smem, indices_smem))
            bit_after = lax.div(bit, 2)
            return bit_after, bit_after, 1 - turn, *across_warps(team, smem, pair, rank, (mask, bit))

        start = size - 1, lax.div(size, 2), turn, *pair
        *_, turn, key, index = lax.while_loop(lambda state: state[1] >= WARP, step, start)
        return 2 * size, turn, *within_warps((key, index), WITHIN_WARP)

    start = jnp.int32(2 * WARP), jnp.int32(1), *within_warps(pair, WARP_IN_ORDER)
    _, _, *pair = lax.while_loop(lambda state: state[0] <= n, merged, start)
    return rank, tuple(pair)


def within_warps(pair: Pair, steps: Sequence[Step]) -> Pair:
    if is_interpreted():
        place = lax.iota(jnp.int32, len(pair[0]))
        for mask, bit in steps:
            pair = _kept(pair, tuple(x[place ^ mask] for x in pair), (place & bit) == 0)
        return pair
    layout, found = _types(pair)

    @plgpu.inline_mgpu(arg_types=(layout, layout), return_type=(found, found))
    def run(_ctx: Any, *pair: Any) -> Any:
        pairs = _scalars(*pair)
        lane = llvm.inline_asm(word(), [], "mov.u32 $0, %laneid;", "=r")
        for mask, bit in steps:
            lower = _unset(lane, constant(bit))
            others = [tuple(utils.shfl_bfly(x, mask) for x in pair) for pair in pairs]
            pairs = [_kept_mosaic(*both, lower) for both in zip(pairs, others, strict=True)]
        return _vectors(pairs, layout)

    return run(*pair)


def across_warps(team: Team, smem: tuple[Any, Any], pair: Pair, rank: jax.Array, step: Step) -> Pair:
    """smem: int32 [n] each, which nobody reads now."""
    mask, bit = step
    if is_interpreted():
        own = pl.ds(team.member * len(rank), len(rank))
        for x_smem, x in zip(smem, pair, strict=True):
            x_smem[own] = x
        team.sync()
        return _kept(pair, tuple(x_smem[...][rank ^ mask] for x_smem in smem), (rank & bit) == 0)
    ref = plgpu.RefType()
    layout, found = _types(pair)
    arg_types = ref, ref, layout, SCALAR, SCALAR, layout, layout

    @plgpu.inline_mgpu(arg_types=arg_types, return_type=(found, found))
    def run(_ctx: Any, keys: Any, indices: Any, rank: Any, mask: Any, bit: Any, *pair: Any) -> Any:
        bases, ranks, pairs = [utils.memref_ptr(x) for x in (keys, indices)], _scalars(rank), _scalars(*pair)
        for (own,), values in zip(ranks, pairs, strict=True):
            for base, x in zip(bases, values, strict=True):
                llvm.store(x, utils.getelementptr(base, [own], word()))
        barrier()
        kept = []
        for (own,), values in zip(ranks, pairs, strict=True):
            there = arith.xori(own, the(mask))
            other = tuple(llvm.load(word(), utils.getelementptr(base, [there], word())) for base in bases)
            kept.append(_kept_mosaic(values, other, _unset(own, the(bit))))
        return _vectors(kept, layout)

    return run(*smem, rank, *step, *pair)


def _kept(pair: Pair, other: Pair, lower: jax.Array) -> Pair:
    """Which of the two stays here."""
    before = (pair[0] > other[0]) | ((pair[0] == other[0]) & (pair[1] < other[1]))
    key, index = (jnp.where(before == lower, x, y) for x, y in zip(pair, other, strict=True))
    return key, index


def _kept_mosaic(pair: Values, other: Values, lower: ir.Value) -> Values:
    kind = arith.CmpIPredicate
    larger, equal = (arith.cmpi(x, pair[0], other[0]) for x in (kind.sgt, kind.eq))
    before = arith.ori(larger, arith.andi(equal, arith.cmpi(kind.slt, pair[1], other[1])))
    stays = arith.cmpi(kind.eq, before, lower)
    return tuple(arith.select(stays, x, y) for x, y in zip(pair, other, strict=True))


def _unset(x: ir.Value, bit: ir.Value) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.eq, arith.andi(x, bit), constant(0))


def _types(pair: Pair) -> tuple[Any, Any]:
    shape = pair[0].shape
    return in_lanes(*shape), plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=in_lanes(*shape))


def _scalars(*arrays: Any) -> list[Values]:
    return list(zip(*([x for _, x in each_scalar(array)] for array in arrays), strict=True))


def _vectors(values: list[Values], layout: Any) -> tuple[Any, ...]:
    one = ir.VectorType.get((1,), word())
    arrays = (
        np.array([vector.broadcast(one, x) for x in column], dtype=object) for column in zip(*values, strict=True)
    )
    layout = layout.to_mgpu()
    return tuple(mgpu.FragmentedArray(_registers=x, _layout=layout, _is_signed=True) for x in arrays)

"""The k largest of some keys, and sums over a warpgroup, where Pallas would reduce over the warpgroup once for each.

A lane sorts its neighbouring keys; then the largest of all is the largest of what the lanes have first (REDUX), whose
lane moves on to its next. Every warp does so for itself, and no warp waits for another. A key and its place are one
number of 64 bits, of which no two are equal: the upper half is the key, the lower one the larger the lower the place.
The interpreter's twins are in jnp.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.mosaic.addresses import constant, i32
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.warp import WARP, WARPS, lane, thread, warp
from pallas_kernels.mosaic.words import lanes

SCALAR = plgpu.Layout.WG_SPLAT(())


def best(keys_smem: Any, k: int) -> list[jax.Array]:
    """The places of the k largest of int32 keys [n], n a multiple of 128, in order; of equal ones the lower first."""
    count = keys_smem.shape[0]
    if is_interpreted():
        return list(lax.top_k(keys_smem[...], k)[1])
    each = count // WARP

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=[plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=SCALAR)] * k,
    )
    def run(_ctx: Any, keys: ir.Value) -> list[Any]:
        first = arith.muli(lane(), constant(each))
        held = [(key, arith.addi(first, constant(i))) for i, key in enumerate(_load(keys, first, each))]
        return [mgpu.FragmentedArray.splat(place, (), is_signed=True) for place in k_best(held, k)]

    return run(keys_smem)


def k_best(held: list[tuple[ir.Value, ir.Value]], k: int) -> list[ir.Value]:
    """The places of the k largest keys of a warp, of which a lane holds pairs of key and place: of neighbours."""
    own = []
    for key, place in held:
        upper = arith.shli(arith.extui(_i64(), key), utils.c(32, _i64()))
        own.append(arith.ori(upper, arith.extui(_i64(), arith.xori(place, constant(-1)))))
    _sort_down(own)
    own = own[:k]  # no lane has more to give
    lower_lanes = llvm.inline_asm(i32(), [], "mov.u32 $0, %lanemask_lt;", "=r")
    chosen = []
    for _ in range(k):
        key, place = _halves(own[0])
        here = arith.cmpi(arith.CmpIPredicate.eq, key, _redux("max.s32", key))
        found = _redux("max.u32", arith.select(here, place, constant(0)))
        # The lane of `found`, which is the first that has such a key, without waiting for it.
        before = arith.andi(_ballot(here), lower_lanes)
        mine = arith.andi(here, arith.cmpi(arith.CmpIPredicate.eq, before, constant(0)))
        following = [*own[1:], utils.c(-(2**63), _i64())]  # below any number's key
        own = [arith.select(mine, then, now) for then, now in zip(following, own, strict=True)]
        chosen.append(arith.xori(found, constant(-1)))
    return chosen


def sync() -> None:
    """What the warpgroup has loaded from shared memory may be stored over behind it."""
    if not is_interpreted():
        plgpu.inline_mgpu()(lambda _ctx: utils.warpgroup_barrier())()


def keep(*stored: tuple[Any, jax.Array]) -> None:
    """ref[...] = x of each pair, x a vector in `lanes`: one barrier for all, where Pallas has two for each."""
    refs, vectors = zip(*stored, strict=True)
    if is_interpreted():
        for ref, x in stored:
            ref[...] = x
        return

    @plgpu.inline_mgpu(arg_types=([plgpu.RefType()] * len(refs), [lanes(len(x)) for x in vectors]))
    def run(_ctx: Any, refs: list[ir.Value], vectors: list[Any]) -> None:
        for ref, x in zip(refs, vectors, strict=True):
            for i, register in enumerate(x.registers.ravel()):
                at = arith.addi(thread(), constant(i * WARPS * WARP))
                address = utils.getelementptr(utils.memref_ptr(ref), [at], x.mlir_dtype)
                llvm.store(vector.extract(register, [], [0]), address, alignment=4)
        utils.warpgroup_barrier()

    run(list(refs), list(vectors))


def totals(vectors: list[jax.Array], sums_smem: Any) -> list[jax.Array]:
    """The sum of each int32 vector [128]. sums_smem: int32 [4, at least as many as there are vectors]."""
    if is_interpreted():
        return [jnp.sum(x) for x in vectors]
    layout = lanes(len(vectors[0]))
    stride = sums_smem.shape[1]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), [layout] * len(vectors)),
        return_type=[plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=SCALAR)] * len(vectors),
    )
    def run(_ctx: Any, sums: ir.Value, vectors: list[Any]) -> list[Any]:
        leader = arith.cmpi(arith.CmpIPredicate.eq, lane(), constant(0))
        base = llvm.ptrtoint(i32(), utils.memref_ptr(sums))
        own = arith.addi(base, arith.muli(warp(), constant(4 * stride)))
        for i, x in enumerate(vectors):
            (register,) = x.registers.ravel()
            total = _redux("add.s32", vector.extract(register, [], [0]))
            args = [arith.addi(own, constant(4 * i)), total, leader]
            llvm.inline_asm(None, args, "@$2 st.shared.b32 [$0], $1;", "r,r,b,~{memory}", has_side_effects=True)
        utils.warpgroup_barrier()
        found = []
        for i in range(len(vectors)):
            total = None
            for other in range(WARPS):
                args = [arith.addi(base, constant(4 * (other * stride + i)))]
                part = llvm.inline_asm(i32(), args, "ld.shared.b32 $0, [$1];", "=r,r", has_side_effects=True)
                total = part if total is None else arith.addi(total, part)
            found.append(mgpu.FragmentedArray.splat(total, (), is_signed=True))
        return found

    return run(sums_smem, vectors)


def count(bins_smem: Any, vectors: list[jax.Array]) -> None:
    """bins_smem[x] += 1 for every element x of int32 vectors [128]; what is no place in it is counted in the last."""
    last = bins_smem.shape[0] - 1
    if is_interpreted():
        bins = bins_smem[...]
        for x in vectors:
            bins = bins.at[jnp.minimum(x, last)].add(1)
        bins_smem[...] = bins
        return
    layout = lanes(len(vectors[0]))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), [layout] * len(vectors)))
    def run(_ctx: Any, bins: ir.Value, vectors: list[Any]) -> None:
        base = llvm.ptrtoint(i32(), utils.memref_ptr(bins))
        for x in vectors:
            (register,) = x.registers.ravel()
            place = arith.minui(vector.extract(register, [], [0]), constant(last))
            address = arith.addi(base, arith.shli(place, constant(2)))
            llvm.inline_asm(None, [address], "red.shared.add.u32 [$0], 1;", "r,~{memory}", has_side_effects=True)
        utils.warpgroup_barrier()

    run(bins_smem, vectors)


def _load(keys: ir.Value, first: ir.Value, each: int) -> list[ir.Value]:
    found = []
    for i in range(0, each, 4):
        address = utils.getelementptr(utils.memref_ptr(keys), [arith.addi(first, constant(i))], i32())
        four = llvm.load(ir.VectorType.get((4,), i32()), address, alignment=16)
        found += [vector.extract(four, [], [j]) for j in range(4)]
    return found


def _sort_down(values: list[ir.Value]) -> None:
    for low, high in comparators(len(values)):
        a, b = values[low], values[high]
        ordered = arith.cmpi(arith.CmpIPredicate.sgt, a, b)
        values[low], values[high] = arith.select(ordered, a, b), arith.select(ordered, b, a)


def comparators(count: int) -> Iterator[tuple[int, int]]:
    """Batcher's merge exchange: which pairs to put in order, one after another, to sort `count` values."""
    top = 1 << max(0, (count - 1).bit_length() - 1)
    p = top
    while p:
        q, r, distance = top, 0, p
        while True:
            for i in range(count - distance):
                if i & p == r:
                    yield i, i + distance
            if q == p:
                break
            distance, q, r = q - p, q // 2, p
        p //= 2


def _halves(x: ir.Value) -> tuple[ir.Value, ir.Value]:
    word = i32()
    return arith.trunci(word, arith.shrui(x, utils.c(32, _i64()))), arith.trunci(word, x)


def _redux(operation: str, x: ir.Value) -> ir.Value:
    ptx = f"redux.sync.{operation} $0, $1, 0xffffffff;"
    return llvm.inline_asm(x.type, [x], ptx, "=r,r", has_side_effects=True)


def _ballot(x: ir.Value) -> ir.Value:
    return llvm.inline_asm(i32(), [x], "vote.sync.ballot.b32 $0, $1, 0xffffffff;", "=r,b", has_side_effects=True)


def _i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)

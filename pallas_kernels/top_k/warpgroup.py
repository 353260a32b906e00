"""What a warpgroup does with entries that Pallas has no words for: put, bound, count, append.

Vectors are int32 or float32 [n], n a multiple of 128, element i in lane i % 128. What is stored in shared memory all
warpgroups of a thread block may store at once. The interpreter's twins are in jnp.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.top_k.team import Team

WARP = 32
BINS = 256
NOWHERE = 128  # words behind bins, where what is in none of them is counted
PER_LANE = BINS // WARP
SCALAR = plgpu.Layout.WG_SPLAT(())


def in_lanes(n: int) -> Any:
    return plgpu.Layout.WG_STRIDED((n,), vec_size=1)


def put(team: Team, ref_gmem: Any, index: jax.Array, value: jax.Array, where: jax.Array) -> None:
    """ref_gmem[index] = value at those of a vector that `where`, int32, is not 0 of."""
    if is_interpreted():
        kept = jnp.where(where != 0, index, ref_gmem.shape[0])

        def run() -> None:
            ref_gmem[...] = ref_gmem[...].at[kept].set(value, mode="drop")

        team.in_turn(run)
        return
    layout = in_lanes(*index.shape)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, layout, layout))
    def run_mosaic(_ctx: Any, ref: Any, index: Any, value: Any, where: Any) -> None:
        base = utils.memref_ptr(ref)
        for at, i in each_scalar(index):
            address = utils.getelementptr(base, [i], word())
            store_if("global", "l", where.registers[at], address, value.registers[at])

    run_mosaic(ref_gmem, index, value, where)


def width(x: jax.Array) -> jax.Array:
    """How many bits it takes to write the unsigned integer x."""
    if is_interpreted():
        return 32 - lax.clz(x)

    @plgpu.inline_mgpu(arg_types=(SCALAR,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR))
    def run(_ctx: Any, x: Any) -> Any:
        zeros = llvm.inline_asm(word(), [the(x)], "clz.b32 $0, $1;", "=r,r")
        return mgpu.FragmentedArray.splat(arith.subi(constant(32), zeros), (), is_signed=True)

    return run(x)


def bound(team: Team, bounds_smem: Any, x: jax.Array) -> None:
    """bounds_smem[0] and [1] = the least and the largest of what they are and x."""
    if is_interpreted():

        def run() -> None:
            bounds_smem[0] = jnp.minimum(bounds_smem[0], jnp.min(x))
            bounds_smem[1] = jnp.maximum(bounds_smem[1], jnp.max(x))

        team.in_turn(run)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), in_lanes(*x.shape)))
    def run_mosaic(_ctx: Any, bounds: Any, x: Any) -> None:
        base = shared_address(bounds)
        for i, (name, operation) in enumerate((("min", arith.minsi), ("max", arith.maxsi))):
            best = functools.reduce(operation, (value for _, value in each_scalar(x)))
            ptx = f"""{{ .reg .b32 best; redux.sync.{name}.s32 best, $1, 0xffffffff;
                red.shared.{name}.s32 [$0 + {4 * i}], best; }}"""
            llvm.inline_asm(None, [base, best], ptx, "r,r,~{memory}", has_side_effects=True)

    run_mosaic(bounds_smem, x)


def count(team: Team, bins_smem: Any, x: jax.Array, where: jax.Array, bin_of: tuple[jax.Array, ...]) -> None:
    """bins_smem[(x - base) >> shift] += 1 for those x in base, base + 1, ... base + span that `where` is not 0 of.

    bin_of: base, shift and span, which is unsigned. The last NOWHERE words are no bins.
    """
    bins_held = bins_smem.shape[0] - NOWHERE
    base, shift, span = bin_of
    if is_interpreted():
        offset = lax.bitcast_convert_type(x - base, jnp.uint32)
        inside = (offset <= lax.bitcast_convert_type(span, jnp.uint32)) & (where != 0)
        digit = jnp.where(inside, lax.shift_right_logical(x - base, shift), bins_held)

        def run() -> None:
            bins_smem[...] = bins_smem[...].at[digit].add(1)

        team.in_turn(run)
        return
    layout = in_lanes(*x.shape)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, layout, SCALAR, SCALAR, SCALAR))
    def run_mosaic(_ctx: Any, bins: Any, x: Any, where: Any, *bin_of: Any) -> None:
        first = shared_address(bins)
        base, shift, span = (the(y) for y in bin_of)
        lane = llvm.inline_asm(word(), [], "mov.u32 $0, %laneid;", "=r")
        nowhere = arith.addi(lane, constant(bins_held))  # a branch around the atomic would take longer
        for at, value in each_scalar(x):
            offset = arith.subi(value, base)
            inside = arith.cmpi(arith.CmpIPredicate.ule, offset, span)
            wanted = arith.andi(inside, is_set(where.registers[at]))
            place = arith.select(wanted, arith.shrui(offset, shift), nowhere)
            address = arith.addi(first, arith.shli(place, constant(2)))
            llvm.inline_asm(None, [address], "red.shared.add.u32 [$0], 1;", "r,~{memory}", has_side_effects=True)

    run_mosaic(bins_smem, x, where, base, shift, span)


def find(bins_smem: Any, need: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Counting down from the last bin, the one that holds item `need`: its number, which item of it that is, how many.

    Every warp finds it for itself: a lane has eight neighbouring bins.
    """
    if is_interpreted():
        bins = bins_smem[...][:BINS]
        upto = jnp.cumsum(bins[::-1])[::-1]
        found = jnp.sum((upto >= need).astype(jnp.int32)) - 1
        return found, need - (upto[found] - bins[found]), bins[found]
    one = plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR), return_type=(one, one, one))
    def run(_ctx: Any, bins: Any, need: Any) -> Any:
        wanted = the(need)
        lane = llvm.inline_asm(word(), [], "mov.u32 $0, %laneid;", "=r")
        first = arith.muli(lane, constant(PER_LANE))
        own = []
        for half in range(2):
            start = arith.addi(first, constant(4 * half))
            address = utils.getelementptr(utils.memref_ptr(bins), [start], word())
            four = llvm.load(ir.VectorType.get((4,), word()), address, alignment=16)
            own += [vector.extract(four, [], [i]) for i in range(4)]
        total = own[0]
        for other in own[1:]:
            total = arith.addi(total, other)
        above = arith.subi(scanned(total, "down"), total)
        answers = [constant(-1)] * 3
        for i in reversed(range(PER_LANE)):
            upto = arith.addi(above, own[i])
            short = arith.cmpi(arith.CmpIPredicate.slt, above, wanted)
            enough = arith.cmpi(arith.CmpIPredicate.sge, upto, wanted)
            here = arith.andi(short, enough)
            values = arith.addi(first, constant(i)), arith.subi(wanted, above), own[i]
            answers = [arith.select(here, new, old) for new, old in zip(values, answers, strict=True)]
            above = upto
        everyone = "redux.sync.max.s32 $0, $1, 0xffffffff;"
        answers = [llvm.inline_asm(word(), [x], everyone, "=r,r", has_side_effects=True) for x in answers]
        return tuple(mgpu.FragmentedArray.splat(x, (), is_signed=True) for x in answers)

    return run(bins_smem, need)


def append(team: Team, size_smem: Any, where: Sequence[jax.Array], *stored: tuple[Any, Sequence[jax.Array]]) -> None:
    """Stores those values that `where`, 0 or 1, is 1 of behind the first size_smem[0] of each ref, in any order."""
    refs, values = zip(*stored, strict=True)
    if is_interpreted():
        wanted = jnp.concatenate(where)

        def run() -> None:
            size = size_smem[0]
            place = jnp.where(wanted != 0, size + jnp.cumsum(wanted) - 1, refs[0].shape[0])
            for ref, value in stored:
                ref[...] = ref[...].at[place].set(jnp.concatenate(value), mode="drop")
            size_smem[0] = size + jnp.sum(wanted)

        team.in_turn(run)
        return
    count, layout = len(where), in_lanes(*where[0].shape)
    kinds = plgpu.RefType(), *[plgpu.RefType()] * len(refs), *[layout] * (count * (1 + len(refs)))

    @plgpu.inline_mgpu(arg_types=kinds)
    def run_mosaic(_ctx: Any, size: Any, *rest: Any) -> None:
        bases, vectors = [shared_address(ref) for ref in rest[: len(refs)]], rest[len(refs) :]
        registers = [
            [x for y in vectors[i : i + count] for x in y.registers.flat] for i in range(0, len(vectors), count)
        ]
        wanted, *values = registers
        taken = constant(0)
        for w in wanted:
            taken = arith.addi(taken, scalar(w))
        # The last lane knows how many the warp has, and makes room for them.
        upto = scanned(taken, "up")
        ptx = """{ .reg .pred last; .reg .b32 lane, start;
            mov.u32 lane, %laneid;
            setp.eq.u32 last, lane, 31;
            mov.b32 start, 0;
            @last atom.shared.add.u32 start, [$2], $1;
            shfl.sync.idx.b32 $0, start, 31, 31, 0xffffffff; }"""
        args = [upto, shared_address(size)]
        start = llvm.inline_asm(word(), args, ptx, "=r,r,r,~{memory}", has_side_effects=True)
        place = arith.shli(arith.subi(arith.addi(start, upto), taken), constant(2))
        for i, w in enumerate(wanted):
            for base, value in zip(bases, values, strict=True):
                store_if("shared", "r", w, arith.addi(base, place), value[i])
            place = arith.addi(place, arith.shli(scalar(w), constant(2)))

    run_mosaic(size_smem, *refs, *where, *(x for value in values for x in value))


def each_scalar(x: Any) -> Iterator[tuple[tuple[int, ...], ir.Value]]:
    return ((at, scalar(register)) for at, register in np.ndenumerate(x.registers))


def scalar(register: ir.Value) -> ir.Value:
    return vector.extract(register, [], [0])


def is_set(register: ir.Value) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.ne, scalar(register), constant(0))


def shared_address(ref: ir.Value) -> ir.Value:
    return llvm.ptrtoint(word(), utils.memref_ptr(ref))


def word() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def constant(value: int) -> ir.Value:
    return utils.c(value, word())


def the(x: Any) -> ir.Value:
    """The value of a scalar."""
    value = x.registers.item()
    return scalar(value) if isinstance(value.type, ir.VectorType) else value


def store_if(space: str, address_kind: str, where: ir.Value, address: ir.Value, value: ir.Value) -> None:
    args, kinds = [address, scalar(value), is_set(where)], f"{address_kind},r,b,~{{memory}}"
    llvm.inline_asm(None, args, f"@$2 st.{space}.b32 [$0], $1;", kinds, has_side_effects=True)


def scanned(x: ir.Value, way: str) -> ir.Value:
    """The sum of a warp's lanes up to this one ("up"), or from this one on ("down")."""
    edge = {"up": 0, "down": 31}[way]
    for distance in (1, 2, 4, 8, 16):
        ptx = f"""{{ .reg .pred p; .reg .b32 other;
            shfl.sync.{way}.b32 other|p, $1, {distance}, {edge}, 0xffffffff;
            @!p mov.b32 other, 0;
            add.s32 $0, $1, other; }}"""
        x = llvm.inline_asm(word(), [x], ptx, "=r,r", has_side_effects=True)
    return x

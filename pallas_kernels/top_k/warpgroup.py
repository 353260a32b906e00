"""What a warpgroup does with entries that Pallas has no words for: look up, count, append, exchange.

Vectors are int32 or float32 [n], n a multiple of 128, element i in lane i % 128. The interpreter's twins are in jnp.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

from pallas_kernels.mosaic.interpreter import is_interpreted

LANES, WARP = 128, 32
BINS = 256
PER_LANE = BINS // WARP
SCALAR = plgpu.Layout.WG_SPLAT(())


def in_lanes(n: int) -> Any:
    return plgpu.Layout.WG_STRIDED((n,), vec_size=1)


def sync() -> None:
    """What the warpgroup has stored is there for all of it, and what it loads has been read."""
    if not is_interpreted():
        plgpu.inline_mgpu()(lambda _ctx: utils.warpgroup_barrier())()


def fetch(row_gmem: Any, row_smem: Any) -> None:
    """row_smem[:n] = row_gmem [n], past the registers; n is a multiple of 4 and the row aligned to 16 bytes."""
    (n,) = row_gmem.shape
    if is_interpreted():
        row_smem[pl.ds(0, n)] = row_gmem[...]
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def run(_ctx: Any, row_gmem: Any, row_smem: Any) -> None:
        own = arith.shli(arith.remui(utils.thread_idx(), _constant(LANES)), _constant(2))
        ptx = """{ .reg .pred p; setp.lt.s32 p, $2, $3;
            @p cp.async.cg.shared.global [$0], [$1], 16; }"""
        for first in range(0, n, 4 * LANES):
            at = arith.addi(own, _constant(first))
            source = utils.getelementptr(utils.memref_ptr(row_gmem), [at], _word())
            to = arith.addi(_shared_address(row_smem), arith.shli(at, _constant(2)))
            llvm.inline_asm(None, [to, source, at, _constant(n)], ptx, "r,l,r,r,~{memory}", has_side_effects=True)
        llvm.inline_asm(None, [], "cp.async.wait_all;", "~{memory}", has_side_effects=True)
        utils.warpgroup_barrier()

    run(row_gmem, row_smem)


def look_up(ref: Any, index: jax.Array) -> jax.Array:
    """ref[index], of a vector in either memory."""
    if is_interpreted():
        return ref[...][index]
    layout = in_lanes(*index.shape)
    found = plgpu.ShapeDtypeStruct(index.shape, ref.dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout), return_type=found)
    def run(_ctx: Any, ref: Any, index: Any) -> Any:
        registers = np.empty_like(index.registers)
        base, element = utils.memref_ptr(ref), ir.MemRefType(ref.type).element_type
        for at, i in _each(index):
            address = utils.getelementptr(base, [i], element)
            registers[at] = llvm.load(ir.VectorType.get((1,), element), address, alignment=4)
        signed = utils.is_signed(found.dtype)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=signed)

    return run(ref, index)


def put(ref: Any, index: jax.Array, value: jax.Array, where: jax.Array) -> None:
    """ref[index] = value at those of a vector that `where`, int32, is not 0 of."""
    if is_interpreted():
        kept = jnp.where(where != 0, index, ref.shape[0])
        ref[...] = ref[...].at[kept].set(value, mode="drop")
        return
    layout = in_lanes(*index.shape)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, layout, layout))
    def run(_ctx: Any, ref: Any, index: Any, value: Any, where: Any) -> None:
        for at, i in _each(index):
            _store_if(where.registers[at], ref, i, value.registers[at])

    run(ref, index, value, where)


def count(bins_smem: Any, digit: jax.Array, where: jax.Array) -> None:
    """bins_smem[d] += how many digits are d, of those that `where`, 0 or 1, is 1 of."""
    if is_interpreted():
        bins_smem[...] = bins_smem[...].at[digit].add(where)
        return
    layout = in_lanes(*digit.shape)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, layout))
    def run(_ctx: Any, bins: Any, digit: Any, where: Any) -> None:
        base = _shared_address(bins)
        ptx = "{ .reg .pred p; setp.ne.s32 p, $1, 0; @p red.shared.add.u32 [$0], 1; }"
        for at, d in _each(digit):
            address = arith.addi(base, arith.shli(d, _constant(2)))
            llvm.inline_asm(None, [address, _scalar(where.registers[at])], ptx, "r,r,~{memory}", has_side_effects=True)

    run(bins_smem, digit, where)


def find(bins_smem: Any, need: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Counting down from the last bin, the one that holds item `need`: its number, which item of it that is, how many.

    Every warp finds it for itself: a lane has eight neighbouring bins.
    """
    if is_interpreted():
        bins = bins_smem[...]
        upto = jnp.cumsum(bins[::-1])[::-1]
        found = jnp.sum((upto >= need).astype(jnp.int32)) - 1
        return found, need - (upto[found] - bins[found]), bins[found]
    one = plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR), return_type=(one, one, one))
    def run(_ctx: Any, bins: Any, need: Any) -> Any:
        wanted = need.registers.item()
        wanted = _scalar(wanted) if isinstance(wanted.type, ir.VectorType) else wanted
        lane = llvm.inline_asm(_word(), [], "mov.u32 $0, %laneid;", "=r")
        first = arith.muli(lane, _constant(PER_LANE))
        own = []
        for half in range(2):
            start = arith.addi(first, _constant(4 * half))
            address = utils.getelementptr(utils.memref_ptr(bins), [start], _word())
            four = llvm.load(ir.VectorType.get((4,), _word()), address, alignment=16)
            own += [vector.extract(four, [], [i]) for i in range(4)]
        total = own[0]
        for other in own[1:]:
            total = arith.addi(total, other)
        above = arith.subi(_scanned(total, "down"), total)
        answers = [_constant(-1)] * 3
        for i in reversed(range(PER_LANE)):
            upto = arith.addi(above, own[i])
            short = arith.cmpi(arith.CmpIPredicate.slt, above, wanted)
            enough = arith.cmpi(arith.CmpIPredicate.sge, upto, wanted)
            here = arith.andi(short, enough)
            values = arith.addi(first, _constant(i)), arith.subi(wanted, above), own[i]
            answers = [arith.select(here, new, old) for new, old in zip(values, answers, strict=True)]
            above = upto
        everyone = "redux.sync.max.s32 $0, $1, 0xffffffff;"
        answers = [llvm.inline_asm(_word(), [x], everyone, "=r,r", has_side_effects=True) for x in answers]
        return tuple(mgpu.FragmentedArray.splat(x, (), is_signed=True) for x in answers)

    return run(bins_smem, need)


def append(size_smem: Any, where: jax.Array, *stored: tuple[Any, jax.Array]) -> None:
    """Stores those values that `where`, 0 or 1, is 1 of behind the first size_smem[0] of each ref, in any order."""
    refs, values = zip(*stored, strict=True)
    if is_interpreted():
        size = size_smem[0]
        place = jnp.where(where != 0, size + jnp.cumsum(where) - 1, refs[0].shape[0])
        for ref, value in stored:
            ref[...] = ref[...].at[place].set(value, mode="drop")
        size_smem[0] = size + jnp.sum(where)
        return
    layout = in_lanes(*where.shape)
    kinds = (plgpu.RefType(), layout, *[plgpu.RefType()] * len(refs), *[layout] * len(refs))

    @plgpu.inline_mgpu(arg_types=kinds)
    def run(_ctx: Any, size: Any, where: Any, *rest: Any) -> None:
        refs, values = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        taken = _constant(0)
        for _, w in _each(where):
            taken = arith.addi(taken, w)
        # The last lane knows how many the warp has, and makes room for them.
        upto = _scanned(taken, "up")
        ptx = """{ .reg .pred last; .reg .b32 lane, start;
            mov.u32 lane, %laneid;
            setp.eq.u32 last, lane, 31;
            mov.b32 start, 0;
            @last atom.shared.add.u32 start, [$2], $1;
            shfl.sync.idx.b32 $0, start, 31, 31, 0xffffffff; }"""
        args = [upto, _shared_address(size)]
        start = llvm.inline_asm(_word(), args, ptx, "=r,r,r,~{memory}", has_side_effects=True)
        place = arith.subi(arith.addi(start, upto), taken)
        for at, w in _each(where):
            for ref, value in zip(refs, values, strict=True):
                _store_if(where.registers[at], ref, place, value.registers[at])
            place = arith.addi(place, w)

    run(size_smem, where, *refs, *values)


def exchanged(x: jax.Array, distance: int, x_smem: Any) -> jax.Array:
    """y[i] = x[i ^ distance]; distance is a power of two. x_smem: as many elements, for what crosses warps."""
    (n,) = x.shape
    if is_interpreted():
        return x.reshape(-1, 2, distance)[:, ::-1].reshape(n)
    layout = in_lanes(n)
    if WARP <= distance < LANES:
        sync()
        x_smem[...] = x
        sync()
        return look_up(x_smem, plgpu.broadcasted_iota(jnp.int32, (n,), 0, layout=layout) ^ distance)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout))
    def run(_ctx: Any, x: Any) -> Any:
        registers = np.empty_like(x.registers)
        flat = x.registers.reshape(-1)
        for i, register in enumerate(flat):
            if distance >= LANES:
                moved = flat[i ^ (distance // LANES)]
            else:
                moved = vector.broadcast(register.type, utils.shfl_bfly(_scalar(register), distance))
            registers.reshape(-1)[i] = moved
        return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=True)

    return run(x)


def _each(x: Any) -> Iterator[tuple[tuple[int, ...], ir.Value]]:
    return ((at, _scalar(register)) for at, register in np.ndenumerate(x.registers))


def _scalar(register: ir.Value) -> ir.Value:
    return vector.extract(register, [], [0])


def _store_if(where: ir.Value, ref: ir.Value, index: ir.Value, value: ir.Value) -> None:
    chosen = arith.cmpi(arith.CmpIPredicate.ne, _scalar(where), _constant(0))
    branch = scf.IfOp(chosen)
    with ir.InsertionPoint(branch.then_block):
        element = ir.MemRefType(ref.type).element_type
        llvm.store(_scalar(value), utils.getelementptr(utils.memref_ptr(ref), [index], element), alignment=4)
        scf.yield_([])


def _scanned(x: ir.Value, way: str) -> ir.Value:
    """The sum of a warp's lanes up to this one ("up"), or from this one on ("down")."""
    edge = {"up": 0, "down": 31}[way]
    for distance in (1, 2, 4, 8, 16):
        ptx = f"""{{ .reg .pred p; .reg .b32 other;
            shfl.sync.{way}.b32 other|p, $1, {distance}, {edge}, 0xffffffff;
            @!p mov.b32 other, 0;
            add.s32 $0, $1, other; }}"""
        x = llvm.inline_asm(_word(), [x], ptx, "=r,r", has_side_effects=True)
    return x


def _shared_address(ref: ir.Value) -> ir.Value:
    return llvm.ptrtoint(_word(), utils.memref_ptr(ref))


def _word() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _constant(value: int) -> ir.Value:
    return utils.c(value, _word())

"""Pieces of who sums for a tile in the form that reads streams once."""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.hyper_connection.once_worker_sm90 import (
    PARTS,
    ROWS,
    STREAMS,
    TOKENS,
    eq,
    f32,
    load_four,
    load_one,
    lt,
    muli,
    select,
    tree,
)
from pallas_kernels.mosaic import lane_rows
from pallas_kernels.mosaic.addresses import constant, i32
from pallas_kernels.mosaic.cluster import SPLAT, address, asm, moved, send, there
from pallas_kernels.mosaic.warp import thread
from pallas_kernels.mosaic.words import lanes

LANES = lanes(128)
SENT = 21  # numbers of a token: 20 products, and the squares
SQUARES = SENT - 1
OWN = 16  # of them are for post and comb


def message_bytes(tokens: int) -> int:
    """That a thread block gets of a tile's partials."""
    return 4 * SENT * tokens


def send_partials(partial_smem: Any, squares_smem: Any, received_smem: Any, barriers: Any, slot: jax.Array, part: jax.Array) -> None:
    """To those who have the tokens. partial [4, 20, tokens], squares [4, tokens], received [.., PARTS, 21, units]."""
    tokens = partial_smem.shape[2]
    units, fours = tokens // TOKENS, tokens // 4
    refs = (plgpu.RefType(),) * 4

    @plgpu.inline_mgpu(arg_types=(*refs, SPLAT, SPLAT))
    def run(
            _ctx: Any, partial: ir.Value, squares: ir.Value, received: ir.Value, barriers: ir.Value, slot: Any, part: Any
        ) -> None:
        slot, part = slot.registers.item(), part.registers.item()
        barrier = arith.addi(address(barriers), muli(slot, 8))
        block = arith.addi(muli(slot, PARTS), part)
        base, t = address(partial), thread()

        def summed(row: ir.Value, four: ir.Value) -> list[ir.Value]:
            at = arith.addi(base, arith.addi(muli(row, 4 * tokens), muli(four, 16)))
            a, b, c, d = (load_four(moved(at, q * ROWS * tokens * 4), f32()) for q in range(4))
            return [arith.addf(arith.addf(w, x), arith.addf(y, z)) for w, x, y, z in zip(a, b, c, d)]

        def send_four(row: ir.Value, four: ir.Value, values: list[ir.Value]) -> None:
            to = muli(arith.addi(muli(block, SENT), row), 4 * units)
            to = arith.addi(address(received), to)
            difference = arith.subi(barrier, to)
            first = arith.andi(muli(four, 4 // units), constant(PARTS - 1))
            for e in range(4 // units):
                remote = there(to, arith.addi(first, constant(e)))
                send(remote, values[e * units : (e + 1) * units], arith.addi(remote, difference))

        rows = SQUARES * fours
        for start in range(0, rows, 128):
            item = arith.addi(t, constant(start))
            with utils.when(lt(item, constant(rows))):
                row, four = arith.divui(item, constant(fours)), arith.remui(item, constant(fours))
                send_four(row, four, summed(row, four))
        with utils.when(arith.cmpi(arith.CmpIPredicate.uge, t, constant(128 - fours))):
            four = arith.addi(t, constant(fours - 128))
            at = arith.addi(address(squares), muli(four, 16))
            of_streams = [load_four(moved(at, 4 * tokens * s), f32()) for s in range(STREAMS)]
            send_four(constant(SQUARES), four, [tree(list(same)) for same in zip(*of_streams)])

    run(partial_smem, squares_smem, received_smem, barriers, slot, part)


def load_partials(received_smem: Any, mixed_smem: Any, slot: jax.Array, first: jax.Array) -> Any:
    """Of lane (n, u) of the first warp: the sums of number n of pre and of the squares, of the unit's own token.

    mixed [first + unit] = the sums of the 16 numbers of post and comb, and of the squares.
    """
    units, pitch = received_smem.shape[3], mixed_smem.shape[1]
    found = plgpu.ShapeDtypeStruct((128,), jnp.float32, layout=LANES)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), SPLAT, SPLAT), return_type=(found, found))
    def run(_ctx: Any, received: ir.Value, mixed: ir.Value, slot: Any, first: Any) -> Any:
        t = thread()
        base = arith.addi(address(received), muli(slot.registers.item(), PARTS * SENT * units * 4))
        early = lt(t, constant(32))
        n = arith.andi(arith.divui(t, constant(units)), constant(3))
        item = arith.addi(t, constant(-32))
        o = arith.divui(item, constant(units))
        own = lt(item, constant((OWN + 1) * units))
        other = arith.addi(arith.addi(muli(arith.shrui(o, constant(2)), 5), arith.andi(o, constant(3))), constant(1))
        other = select(lt(o, constant(OWN)), other, constant(SQUARES))
        row = select(early, muli(n, 5), select(own, other, constant(0)))
        unit = arith.remui(t, constant(units))
        at = arith.addi(base, muli(unit, 4))

        def over_parts(at: ir.Value) -> ir.Value:
            return tree([load_one(moved(at, p * SENT * units * 4)) for p in range(PARTS)])

        number = over_parts(arith.addi(at, muli(row, 4 * units)))
        squares = over_parts(moved(at, SQUARES * units * 4))
        with utils.when(arith.andi(own, arith.cmpi(arith.CmpIPredicate.uge, t, constant(32)))):
            to = muli(arith.addi(first.registers.item(), unit), 4 * pitch)
            to = arith.addi(address(mixed), arith.addi(to, muli(o, 4)))
            asm("st.shared.f32 [$0], $1;", "r,f", to, number)
        return of_lanes(number), of_lanes(squares)

    return run(received_smem, mixed_smem, slot, first)


def send_weights(weights: jax.Array, weights_smem: Any, barriers: Any, slot: jax.Array, part: jax.Array) -> None:
    """Weights of the own tokens, in lanes (n, u) of the first warp, to everybody; weights_smem [2, tokens, 4]."""
    tokens = weights_smem.shape[1]
    units = tokens // TOKENS

    @plgpu.inline_mgpu(arg_types=(LANES, plgpu.RefType(), plgpu.RefType(), SPLAT, SPLAT))
    def run(_ctx: Any, weights: Any, to: ir.Value, barriers: ir.Value, slot: Any, part: Any) -> None:
        slot, part, t = slot.registers.item(), part.registers.item(), thread()
        barrier = arith.addi(address(barriers), muli(slot, 8))
        value = vector.extract(weights.registers.item(), [], [0])
        row = arith.addi(muli(slot, tokens), muli(part, units))
        own = arith.addi(address(to), muli(row, 16))
        with utils.when(lt(t, constant(32))):
            of_units = [[_of_lane(value, n * units + u) for n in range(STREAMS)] for u in range(units)]
            with utils.when(lt(t, constant(PARTS))):
                remote = there(own, t)
                remote_barrier = arith.addi(remote, arith.subi(barrier, own))
                for u, four in enumerate(of_units):
                    send(moved(remote, 16 * u), four, remote_barrier)

    run(weights, weights_smem, barriers, slot, part)


def _of_lane(x: ir.Value, source: int) -> ir.Value:
    text = "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;"
    word = llvm.inline_asm(i32(), [llvm.bitcast(i32(), x), constant(source)], text, "=r,r,r", has_side_effects=True)
    return llvm.bitcast(f32(), word)


def load_base(base_gmem: Any, units: int) -> jax.Array:
    """Of pre, in lanes (n, u)."""
    found = plgpu.ShapeDtypeStruct((128,), jnp.float32, layout=LANES)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=found)
    def run(_ctx: Any, base: ir.Value) -> Any:
        n = arith.andi(arith.divui(thread(), constant(units)), constant(3))
        return of_lanes(llvm.load(f32(), utils.getelementptr(utils.memref_ptr(base), [n], f32())))

    return run(base_gmem)


def send_squares(squares_smem: Any, received_smem: Any, barriers: Any, slot: jax.Array, part: jax.Array) -> None:
    """squares [4, tokens]; received [2, PARTS, tokens]."""
    tokens = squares_smem.shape[1]
    fours = tokens // 4

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType(), SPLAT, SPLAT))
    def run(_ctx: Any, squares: ir.Value, received: ir.Value, barriers: ir.Value, slot: Any, part: Any) -> None:
        slot, part, t = slot.registers.item(), part.registers.item(), thread()
        barrier = arith.addi(address(barriers), muli(slot, 8))
        with utils.when(lt(t, constant(PARTS * fours))):
            rank, four = arith.divui(t, constant(fours)), arith.remui(t, constant(fours))
            at = arith.addi(address(squares), muli(four, 16))
            a, b, c, d = (load_four(moved(at, q * tokens * 4), f32()) for q in range(4))
            values = [arith.addf(arith.addf(w, x), arith.addf(y, z)) for w, x, y, z in zip(a, b, c, d)]
            to = arith.addi(muli(arith.addi(muli(slot, PARTS), part), 4 * tokens), muli(four, 16))
            to = arith.addi(address(received), to)
            remote = there(to, rank)
            send(remote, values, arith.addi(remote, arith.subi(barrier, to)))

    run(squares_smem, received_smem, barriers, slot, part)


def load_squares(received_smem: Any, slot: jax.Array) -> jax.Array:
    """Of thread i: the sum of squares of token i % tokens."""
    tokens = received_smem.shape[2]
    found = plgpu.ShapeDtypeStruct((128,), jnp.float32, layout=LANES)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT), return_type=found)
    def run(_ctx: Any, received: ir.Value, slot: Any) -> Any:
        base = arith.addi(address(received), muli(slot.registers.item(), PARTS * tokens * 4))
        base = arith.addi(base, muli(arith.remui(thread(), constant(tokens)), 4))
        return of_lanes(tree([load_one(moved(base, p * tokens * 4)) for p in range(PARTS)]))

    return run(received_smem, slot)


def store_inverse(inverse_smem: Any, values: jax.Array) -> None:
    tokens = inverse_smem.shape[0]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LANES))
    def run(_ctx: Any, inverse: ir.Value, values: Any) -> None:
        with utils.when(lt(thread(), constant(tokens))):
            to = arith.addi(address(inverse), muli(thread(), 4))
            asm("st.shared.f32 [$0], $1;", "r,f", to, vector.extract(values.registers.item(), [], [0]))

    run(inverse_smem, values)


def load_numbers(mixed_smem: Any, columns: int, first: jax.Array) -> list[jax.Array]:
    """Of mixed [.., pitch], row first + i for thread i; warps hold what their layout says is the same."""
    rows, pitch = mixed_smem.shape
    found = plgpu.ShapeDtypeStruct((lane_rows.ROWS,), jnp.float32, lane_rows.LAYOUT)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT), return_type=[found] * columns)
    def run(_ctx: Any, mixed: ir.Value, first: Any) -> Any:
        row = arith.minui(arith.addi(first.registers.item(), thread()), constant(rows - 1))
        at = arith.addi(address(mixed), muli(row, 4 * pitch))
        return [lane_rows._array(x) for c in range(0, columns, 4) for x in load_four(moved(at, 4 * c), f32())]

    return run(mixed_smem, first)


def store_numbers(
    gmem: Any, values: list[jax.Array], first: jax.Array, count: jax.Array, team: jax.Array, teams: int, units: int,
    part: jax.Array,
) -> None:  # fmt: skip
    """Of the token that thread i has, if first + i < count and there is such a token: row (tile, unit)."""
    tokens, columns = gmem.shape
    layouts = [lane_rows.LAYOUT] * len(values)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layouts, SPLAT, SPLAT, SPLAT, SPLAT))
    def run(_ctx: Any, gmem: ir.Value, values: Any, first: Any, count: Any, team: Any, part: Any) -> None:
        first, count, team, part = (x.registers.item() for x in (first, count, team, part))
        item = arith.addi(first, thread())
        tile, unit = arith.divui(item, constant(units)), arith.remui(item, constant(units))
        row = muli(arith.addi(team, muli(tile, teams)), units * TOKENS)
        row = arith.addi(row, arith.addi(muli(part, units), unit))
        exists = arith.andi(lt(item, count), lt(row, constant(tokens)))
        at = utils.getelementptr(utils.memref_ptr(gmem), [muli(row, columns)], f32())
        for c in range(0, columns, 4):
            four = [vector.extract(x.registers.item(), [], [0]) for x in values[c : c + 4]]
            text = f"@$5 st.global.v4.f32 [$0+{4 * c}], {{$1, $2, $3, $4}};"
            llvm.inline_asm(None, [at, *four, exists], text, "l,f,f,f,f,b,~{memory}", has_side_effects=True)

    run(gmem, values, first, count, team, part)


def of_lanes(value: ir.Value) -> Any:
    layout = LANES.to_mgpu()
    registers = np.empty(layout.registers_shape((128,)), dtype=object) if hasattr(layout, "registers_shape") else None
    registers = np.empty((1,), dtype=object) if registers is None else registers
    registers.flat = [vector.broadcast(ir.VectorType.get((1,), f32()), value)]
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

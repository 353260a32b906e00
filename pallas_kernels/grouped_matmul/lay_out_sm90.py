"""Where the rows of tokens' experts lie, on Hopper: in blocks of one expert each, padded to whole blocks; one launch.

A thread block has some neighbouring blocks of rows. Its first warp adds up how many rows and blocks the experts before
each have, from their counts; then a thread has a row: it finds its expert by bisection, and its token and routing
weight by the order of rows that the router has sorted. XLA makes eight launches of this, or more.

Bound: the latencies of a launch, of three loads that depend on one another, and of the sums. An H200 takes 1.9 us for
16 tokens, where XLA's eight took 10, and 2.2 for 128.
"""

# Pallas decorators turn functions into values, and its transforms look abstract; Mosaic's Python is not typed for
# outsiders.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from pallas_kernels.block_matmul.row_blocks import RowBlocks
from pallas_kernels.mosaic.addresses import constant, i32
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.launch import compiler_params
from pallas_kernels.mosaic.warp import WARP, before, element, lane, thread
from pallas_kernels.router import Routing

THREADS = 128


class Blocks(NamedTuple):
    """Where the routed rows lie: P = most blocks x rows a block.

    row_blocks: the experts of the blocks. place int32 [N, k]: the row of a token's choice, of one token known before.
    token int32 [P]: the token of a row, N where it is padding. factors float32 [P]: its routing weight, 0 where it is
    padding; of one token [k].
    """

    row_blocks: RowBlocks
    place: jax.Array | np.ndarray
    token: jax.Array
    factors: jax.Array


def lay_out(routing: Routing, rows: int) -> Blocks:
    """Blocks of `rows` rows, 128 at most, for a routing of N tokens: at most N k / rows and one more for every expert,
    up to as many as a thread block has."""
    tokens, k = routing.experts.shape
    if tokens == 1:
        return of_one_token(routing, rows)
    assert 0 < rows <= THREADS, f"blocks of {rows} rows: {THREADS} at most"
    choices, count, each = tokens * k, len(routing.counts), THREADS // rows
    parts = -(-(choices // rows + min(count, choices)) // each)
    most = parts * each

    def kernel(*refs):
        *arrays, smem = refs
        (_interpreted if is_interpreted() else _run)(lax.axis_index("part"), arrays, smem, rows, k)

    integers = [jax.ShapeDtypeStruct((size,), jnp.int32) for size in (most, 1, choices, most * rows)]
    expert, real, place, token, factors = plgpu.kernel(
        kernel,
        out_type=[*integers, jax.ShapeDtypeStruct((most * rows,), jnp.float32)],
        grid=(parts,),
        grid_names=("part",),
        compiler_params=compiler_params(),
        scratch_types=[plgpu.SMEM((3, count), jnp.int32)],
    )(
        routing.counts.astype(jnp.int32),
        routing.order.astype(jnp.int32),
        routing.weights.reshape(-1).astype(jnp.float32),
    )
    return Blocks(RowBlocks(expert, real), place.reshape(tokens, k), token, factors)


def of_one_token(routing: Routing, rows: int) -> Blocks:
    """A block for each choice, with one row and one factor. What does not depend on the routing is a constant."""
    _, k = routing.experts.shape
    token = np.where(np.arange(k * rows) % rows == 0, 0, 1).astype(np.int32)
    place = np.arange(0, k * rows, rows, dtype=np.int32)[None]
    blocks = RowBlocks(routing.experts.reshape(k).astype(jnp.int32), jnp.full(1, k, jnp.int32))
    factors = routing.weights.reshape(k).astype(jnp.float32)
    return Blocks(blocks, place, jnp.asarray(token), factors)


def _interpreted(part: jax.Array, arrays: list[Any], smem: Any, rows: int, k: int) -> None:
    counts_gmem, order_gmem, weights_gmem, expert_gmem, real_gmem, place_gmem, token_gmem, factors_gmem = arrays
    counts, order, weights = counts_gmem[...], order_gmem[...], weights_gmem[...]
    each = THREADS // rows
    blocks_end, rows_end = jnp.cumsum(-(-counts // rows)), jnp.cumsum(counts)
    smem[0], smem[2] = blocks_end, rows_end
    smem[1] = rows_end - counts - (blocks_end + -counts // rows) * rows
    row = part * each * rows + jnp.arange(each * rows)
    expert = jnp.minimum(jnp.sum(blocks_end[None] <= row[:, None] // rows, axis=1), len(counts) - 1)
    source = row + smem[1][expert]
    filled = source < rows_end[expert]
    choice = order[jnp.where(filled, source, 0)]
    here = pl.ds(part * each * rows, each * rows)
    token_gmem[here] = jnp.where(filled, choice // k, len(order) // k).astype(jnp.int32)
    factors_gmem[here] = jnp.where(filled, weights[choice], 0.0)
    expert_gmem[pl.ds(part * each, each)] = expert[::rows].astype(jnp.int32)

    @pl.when(part == 0)
    def _real():
        real_gmem[0] = blocks_end[-1].astype(jnp.int32)

    @pl.loop(0, each * rows)
    def _row(i):
        @pl.when(filled[i])
        def _place():
            place_gmem[choice[i]] = row[i]


def _run(part: jax.Array, arrays: list[Any], smem: Any, rows: int, k: int) -> None:
    count, choices, each = arrays[0].shape[0], arrays[1].shape[0], THREADS // rows
    types = (plgpu.RefType(),) * (len(arrays) + 1)

    @plgpu.inline_mgpu(arg_types=(*types, plgpu.Layout.WG_SPLAT(())))
    def run(_ctx: Any, *operands: Any) -> None:
        counts, order, weights, expert_gmem, real, place, token, factors, smem, part = operands
        part = part.registers.item()
        ends, moved, rows_ends = (element(smem, constant(i * count)) for i in range(3))
        is_first = scf.IfOp(arith.cmpi(arith.CmpIPredicate.ult, thread(), constant(WARP)))
        with ir.InsertionPoint(is_first.then_block):
            _add_up(counts, (ends, moved, rows_ends), count, rows)
            scf.yield_([])
        utils.warpgroup_barrier()
        has_row = scf.IfOp(arith.cmpi(arith.CmpIPredicate.ult, thread(), constant(each * rows)))
        with ir.InsertionPoint(has_row.then_block):
            row = arith.addi(arith.muli(part, constant(each * rows)), thread())
            block = arith.divui(row, constant(rows))
            expert = arith.minui(_ended(ends, block, count), constant(count - 1))
            source = arith.addi(row, _load(moved, expert))
            filled = arith.cmpi(arith.CmpIPredicate.slt, source, _load(rows_ends, expert))
            choice = _loaded(order, source, filled, constant(0))
            weight = _loaded(weights, choice, filled, constant(0))
            of_row = arith.select(filled, arith.divui(choice, constant(k)), constant(choices // k))
            begins = arith.cmpi(arith.CmpIPredicate.eq, arith.muli(block, constant(rows)), row)
            always = arith.constant(ir.IntegerType.get_signless(1), 1)
            first = arith.cmpi(arith.CmpIPredicate.eq, row, constant(0))
            for ref, index, value, when in (
                (token, row, of_row, always),
                (factors, row, weight, always),
                (place, choice, row, filled),
                (expert_gmem, block, expert, begins),
                (real, constant(0), _load(ends, constant(count - 1)), first),
            ):
                args = [element(ref, index), value, when]
                llvm.inline_asm(None, args, "@$2 st.global.b32 [$0], $1;", "l,r,b,~{memory}", has_side_effects=True)
            scf.yield_([])

    run(*arrays, smem, part)


def _add_up(counts: ir.Value, to: tuple[ir.Value, ...], count: int, rows: int) -> None:
    """By one warp, for every expert: blocks up to it, how far its rows have moved back, and rows up to it."""
    each = -(-count // WARP)
    first = arith.muli(lane(), constant(each))
    at = [arith.addi(first, constant(i)) for i in range(each)]
    exist = [arith.cmpi(arith.CmpIPredicate.ult, i, constant(count)) for i in at]
    own = [_loaded(counts, i, there, constant(0)) for i, there in zip(at, exist, strict=True)]
    blocks = [arith.divui(arith.addi(one, constant(rows - 1)), constant(rows)) for one in own]
    rows_end, blocks_end = (before(functools.reduce(arith.addi, some)) for some in (own, blocks))
    for i, there, of_rows, of_blocks in zip(at, exist, own, blocks, strict=True):
        moved = arith.subi(rows_end, arith.muli(blocks_end, constant(rows)))
        rows_end, blocks_end = arith.addi(rows_end, of_rows), arith.addi(blocks_end, of_blocks)
        for ref, value in zip(to, (blocks_end, moved, rows_end), strict=True):
            address = llvm.ptrtoint(i32(), utils.getelementptr(ref, [i], i32()))
            text = "@$2 st.shared.b32 [$0], $1;"
            llvm.inline_asm(None, [address, value, there], text, "r,r,b,~{memory}", has_side_effects=True)


def _ended(ends: ir.Value, block: ir.Value, count: int) -> ir.Value:
    """How many experts' blocks end before `block` or with it: ends never fall."""
    found = constant(0)
    for step in (1 << i for i in reversed(range(count.bit_length()))):
        following = arith.addi(found, constant(step))
        last = arith.minui(following, constant(count))
        ended = arith.cmpi(arith.CmpIPredicate.ule, _load(ends, arith.subi(last, constant(1))), block)
        there = arith.cmpi(arith.CmpIPredicate.ule, following, constant(count))
        found = arith.select(arith.andi(ended, there), following, found)
    return found


def _load(pointer: ir.Value, index: ir.Value) -> ir.Value:
    return llvm.load(i32(), utils.getelementptr(pointer, [index], i32()), alignment=4)


def _loaded(ref: ir.Value, index: ir.Value, when: ir.Value, other: ir.Value) -> ir.Value:
    """ref[index] in device memory, `other` and no access where not `when`."""
    text = "{ mov.b32 $0, $3; @$2 ld.global.b32 $0, [$1]; }"
    args = [element(ref, index), when, other]
    return llvm.inline_asm(i32(), args, text, "=&r,l,b,r", has_side_effects=True)

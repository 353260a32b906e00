"""Accumulators that another thread block of the cluster reads: stores, loads and fences, in Mosaic.

What Pallas stores into another thread block's memory goes there in pieces of 8 bytes, each of which counts on a
barrier. Here every thread stores its registers of an accumulator, four at a time, and the thread with the same number
in another thread block loads them: a warp touches 512 bytes in a row, whatever the layout. What lies in the memory is
an array to these functions only. The interpreter, which runs no Mosaic, uses plain stores and loads instead.
"""

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
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

LAYOUT = plgpu.Layout.WGMMA
_THREADS = 128  # of a warpgroup
_PIECE = 16  # bytes a thread moves at once
_CLUSTER = 7  # address space of the shared memory of a cluster


def store(ref: Any, x: jax.Array) -> None:
    """Puts float32 x [64, columns], an accumulator, into this thread block's memory, ref [64, columns]."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LAYOUT))
    def run(_ctx, to, x):
        base, pairs = _of_thread(utils.memref_ptr(to)), x.registers.ravel()
        for i in range(0, len(pairs), 2):
            values = [vector.extract(pair, [], [at]) for pair in pairs[i : i + 2] for at in range(2)]
            four = vector.from_elements(ir.VectorType.get((4,), ir.F32Type.get()), values)
            llvm.store(four, _moved(base, i // 2), alignment=_PIECE)

    run(ref, x)


def load(rank: int, ref: Any) -> jax.Array:
    """float32 [64, columns] that thread block `rank` of the cluster has put at ref [64, columns] of its memory."""

    shape = ref.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, LAYOUT))
    def run(_ctx, at):
        layout = LAYOUT.to_mgpu()
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        there = nvvm.mapa(llvm.PointerType.get(_CLUSTER), utils.memref_ptr(at), utils.c(rank, _word()))
        base, found = _of_thread(there), []
        for i in range(registers.size // 2):
            ptx = f"ld.relaxed.cluster.shared::cluster.v4.f32 {{$0, $1, $2, $3}}, [$4 + {i * _THREADS * _PIECE}];"
            four = utils.inline_ptx(ptx, base, result_types=[ir.F32Type.get()] * 4, has_side_effects=True)
            pair = ir.VectorType.get((2,), ir.F32Type.get())
            found += [vector.from_elements(pair, four[:2]), vector.from_elements(pair, four[2:])]
        registers.flat = found
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return run(ref)


def publish() -> None:
    """Before an arrival at a barrier of the cluster: who waits there and calls `see` loads what was stored here."""

    @plgpu.inline_mgpu()
    def run(_ctx):
        utils.inline_ptx("fence.acq_rel.cluster;", has_side_effects=True)
        utils.warpgroup_barrier()

    run()


def see() -> None:
    """Behind the wait, before the loads: see `publish`."""

    @plgpu.inline_mgpu()
    def run(_ctx):
        utils.inline_ptx("fence.acq_rel.cluster;", has_side_effects=True)

    run()


def _of_thread(pointer: ir.Value) -> ir.Value:
    thread = arith.remui(utils.thread_idx(), utils.c(_THREADS, _word()))
    return _moved(pointer, 0, arith.muli(thread, utils.c(_PIECE, _word())))


def _moved(pointer: ir.Value, pieces: int, extra: ir.Value | None = None) -> ir.Value:
    offset = utils.c(pieces * _THREADS * _PIECE, _word()) if extra is None else extra
    return utils.getelementptr(pointer, [offset], ir.IntegerType.get_signless(8))


def _word() -> ir.Type:
    return ir.IntegerType.get_signless(32)

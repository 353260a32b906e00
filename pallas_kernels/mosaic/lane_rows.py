"""Matrices of 32 rows of which every lane of a warp has one: loads from shared memory, stores to device memory.

A row's numbers are so many arrays [32], each with a register in every lane; the four warps of a warpgroup have the
same. Pallas knows no such transposition of what lies row by row. The interpreter, which runs no Mosaic, indexes.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

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

ROWS = 32
LAYOUT = plgpu.Layout.TILED(plgpu.Tiling(((ROWS,), (1,))), (plgpu.Replicated(4),), (-2,), -1)
_PIECE = 4  # numbers that are moved at once
PITCH = 4  # by which a row in shared memory should be longer than a multiple of 32: then lanes meet different banks


def load(ref: Any, columns: int) -> list[jax.Array]:
    """`columns` arrays [32], of float32 ref [32, columns or more] in shared memory; columns is a multiple of 4."""
    if is_interpreted():
        return [ref[:, c] for c in range(columns)]
    pitch = ref.shape[1]
    of_column = plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, LAYOUT)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=[of_column] * columns)
    def run(_ctx: Any, ref: Any) -> Any:
        base = _row(utils.memref_ptr(ref), _lane(), pitch)
        four = ir.VectorType.get((_PIECE,), ir.F32Type.get())
        pieces = [llvm.load(four, _moved(base, c), alignment=16) for c in range(0, columns, _PIECE)]
        return [_array(vector.extract(piece, [], [i])) for piece in pieces for i in range(_PIECE)]

    return run(ref)


def store(ref: Any, rows: jax.Array, values: list[jax.Array]) -> None:
    """ref[rows[l]] = the numbers that lane l has, for int32 rows that are not negative. ref [.., len(values)] float32.

    rows and values are arrays [32]; there is a multiple of 4 of these.
    """
    if is_interpreted():
        of_lanes = jnp.stack(values, axis=1)

        @pl.loop(0, ROWS)
        def _lane(lane):
            @pl.when(rows[lane] >= 0)
            def _store():
                ref[rows[lane]] = of_lanes[lane]

        return
    columns = len(values)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LAYOUT, [LAYOUT] * columns))
    def run(_ctx: Any, ref: Any, rows: Any, values: Any) -> None:
        row = _number(rows)
        first_warp = arith.cmpi(arith.CmpIPredicate.ult, _thread(), utils.c(ROWS, _word()))
        wanted = arith.cmpi(arith.CmpIPredicate.sge, row, utils.c(0, _word()))
        branch = scf.IfOp(arith.andi(first_warp, wanted))
        with ir.InsertionPoint(branch.then_block):
            base = _row(utils.memref_ptr(ref), row, columns)
            four = ir.VectorType.get((_PIECE,), ir.F32Type.get())
            for c in range(0, columns, _PIECE):
                piece = vector.from_elements(four, [_number(value) for value in values[c : c + _PIECE]])
                llvm.store(piece, _moved(base, c), alignment=16)
            scf.yield_([])

    run(ref, rows, values)


def reciprocal(x: jax.Array) -> jax.Array:
    """1 / x of normal float32 x [32] to a unit in the last place, in one instruction: a division is a dozen."""
    if is_interpreted():
        return 1 / x

    @plgpu.inline_mgpu(arg_types=(LAYOUT,), return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, LAYOUT))
    def run(_ctx: Any, x: Any) -> Any:
        return _array(utils.inline_ptx("rcp.approx.ftz.f32 $0, $1;", _number(x), result_types=ir.F32Type.get()))

    return run(x)


def _number(array: Any) -> ir.Value:
    """What a lane has of an array [32]."""
    (register,) = array.registers.flat
    return vector.extract(register, [], [0])


def _array(number: ir.Value) -> Any:
    registers = np.empty(LAYOUT.to_mgpu().registers_shape((ROWS,)), dtype=object)
    registers.flat = [vector.from_elements(ir.VectorType.get((1,), number.type), [number])]
    return mgpu.FragmentedArray(_registers=registers, _layout=LAYOUT.to_mgpu(), _is_signed=None)


def _row(pointer: ir.Value, row: ir.Value, columns: int) -> ir.Value:
    offset = arith.muli(arith.extsi(ir.IntegerType.get_signless(64), row), utils.c(4 * columns, _long()))
    return utils.getelementptr(pointer, [offset], ir.IntegerType.get_signless(8))


def _moved(pointer: ir.Value, numbers: int) -> ir.Value:
    return utils.getelementptr(pointer, [utils.c(4 * numbers, _word())], ir.IntegerType.get_signless(8))


def _thread() -> ir.Value:
    return arith.remui(utils.thread_idx(), utils.c(128, _word()))


def _lane() -> ir.Value:
    return arith.remui(utils.thread_idx(), utils.c(ROWS, _word()))


def _word() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _long() -> ir.Type:
    return ir.IntegerType.get_signless(64)

"""Words that thread blocks hand to one another: a word that is not 0 is there.

The memory is 0 at the start, by a launch before (`zeros`) or by whoever waits (`clear`). Who has a value stores it as
an int32 that is not 0, and who needs it loads until it is not: one way through the L2 cache, where a semaphore takes
three (the store's answer, the signal, the load behind it). The simulated GPU has no such memory between launches of one
kernel: there what has been stored is there.
"""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
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
from jaxlib.mlir.dialects import arith, llvm, scf, vector

from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.launch import sm_count

THREADS = 128
CHUNK = 512  # words that a warpgroup clears at once, 16 bytes a thread
_LEAST = -(2**31)


def lanes(count: int) -> Any:
    """Element i of a vector in thread i % 128."""
    return plgpu.Layout.WG_STRIDED((count,), vec_size=1)


def zeros(count: int) -> jax.Array:
    """int32 [count, up to whole CHUNKs] of zeros, in a launch that is shorter than XLA's: by 0.6 us for 1 MB."""
    chunks, layout = -(-count // CHUNK), plgpu.Layout.WG_STRIDED((CHUNK,), vec_size=CHUNK // THREADS)

    def kernel(words_gmem: Any) -> None:
        @plgpu.nd_loop((chunks,), collective_axes="block")
        def _chunk(info):
            zeros = plgpu.layout_cast(jnp.zeros((CHUNK,), jnp.int32), layout)
            words_gmem[pl.ds(info.index[0] * CHUNK, CHUNK)] = zeros

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((chunks * CHUNK,), jnp.int32),
        grid=(min(chunks, sm_count()),),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),  # no thread reads what a thread has written
    )()


def of_float(x: jax.Array) -> jax.Array:
    """float32 as words: zero is the negative one."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits == 0, _LEAST, bits)


def publish(words_gmem: Any, start: jax.Array, stride: int, words: jax.Array, shape: tuple[int, int]) -> None:
    """words_gmem[start + r * stride + c] = words[r, c], none of them 0, for r and c in `shape`.

    words: [n] in `lanes`, of which those from rows * columns on are nobody's.
    """
    rows, columns = shape
    if is_interpreted():
        for r in range(rows):
            words_gmem[pl.ds(start + r * stride, columns)] = words[r * columns : (r + 1) * columns]
        return
    layout = lanes(len(words))
    item = plgpu.broadcasted_iota(jnp.int32, words.shape, 0, layout=layout)
    index = start + lax.div(item, columns) * stride + lax.rem(item, columns)
    put(words_gmem, jnp.where(item < rows * columns, index, -1), words, layout)


def put(words_gmem: Any, index: jax.Array, words: jax.Array, layout: Any) -> None:
    """words_gmem[index] = words, none of them 0, both in `layout`; a negative index is nobody's.

    What a thread has side by side must lie side by side, from a multiple of its bytes on.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, layout))
    def run(_ctx: Any, ref: ir.Value, index: Any, words: Any) -> None:
        for at, register in np.ndenumerate(index.registers):
            i, *_ = _numbers(register)
            exists = arith.cmpi(arith.CmpIPredicate.sge, i, utils.c(0, _word()))
            _store(_address(ref, i), _numbers(words.registers[at]), exists)

    run(words_gmem, index, words)


def clear(words_gmem: Any, start: jax.Array, stride: int, shape: tuple[int, int]) -> None:
    """words_gmem[start + r * stride + c] = 0 for r and c in `shape`, whose columns are a multiple of 4."""
    rows, columns = shape
    each = columns // 4

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())))
    def run(_ctx: Any, ref: ir.Value, start: Any) -> None:
        base = _address(ref, _scalar(start.registers.item()))
        thread = arith.remui(utils.thread_idx(), utils.c(THREADS, _word()))
        for first in range(0, rows * each, THREADS):
            item = arith.addi(thread, utils.c(first, _word()))
            row, column = (operation(item, utils.c(each, _word())) for operation in (arith.divui, arith.remui))
            index = arith.addi(_times(row, stride), _times(column, 4))
            exists = arith.cmpi(arith.CmpIPredicate.ult, item, utils.c(rows * each, _word()))
            args = [utils.getelementptr(base, [index], _word()), utils.c(0, _word()), exists]
            ptx = "@$2 st.global.v4.b32 [$0], {$1, $1, $1, $1};"
            llvm.inline_asm(None, args, ptx, "l,r,b,~{memory}", has_side_effects=True)

    run(words_gmem, start)


def wait_for(words_gmem: Any, indices: list[jax.Array]) -> list[jax.Array]:
    """words_gmem[index] for vectors in `lanes`, as soon as all are there."""
    if is_interpreted():
        return [words_gmem[...][index] for index in indices]
    layout = lanes(len(indices[0]))
    found = plgpu.ShapeDtypeStruct(indices[0].shape, jnp.dtype(jnp.int32), layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), [layout] * len(indices)), return_type=[found] * len(indices))
    def run(_ctx: Any, ref: ir.Value, indices: list[Any]) -> list[Any]:
        addresses = [(_address(ref, i), 0) for index in indices for _, i in _each(index)]
        words = iter(_until_all_are_there(addresses))
        return [_array(itertools.islice(words, index.registers.size), index.shape, layout) for index in indices]

    return run(words_gmem, indices)


def wait_behind(
    words_gmem: Any, first: jax.Array, offsets: list[list[int]], shape: tuple[int, ...], layout: Any
) -> list[jax.Array]:
    """Arrays of `shape` in `layout`, a word a register, as soon as all are there.

    A thread finds the r-th register of the a-th array at words_gmem[first + offsets[a][r]], first [..] being an array
    in the same layout with one register: the thread keeps one address for all of them.
    """
    found = plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.int32), layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout), return_type=[found] * len(offsets))
    def run(_ctx: Any, ref: ir.Value, first: Any) -> list[Any]:
        address = _address(ref, _scalar(first.registers.item()))
        words = iter(_until_all_are_there([(address, offset) for of_array in offsets for offset in of_array]))
        return [_array(itertools.islice(words, len(of_array)), shape, layout) for of_array in offsets]

    return run(words_gmem, first)


def _array(words: Iterable[ir.Value], shape: tuple[int, ...], layout: Any) -> Any:
    """Of registers that hold a word each."""
    held = layout.to_mgpu()
    registers = np.empty(held.registers_shape(shape), dtype=object)
    registers.flat = [vector.broadcast(ir.VectorType.get((1,), _word()), word) for word in words]
    return mgpu.FragmentedArray(_registers=registers, _layout=held, _is_signed=True)


def _until_all_are_there(places: list[tuple[ir.Value, int]]) -> list[ir.Value]:
    """Words, of addresses and so many words behind each."""
    kinds = [_word()] * len(places)
    loop = scf.WhileOp(kinds, [])
    with ir.InsertionPoint.at_block_begin(loop.before.blocks.append()):
        words = [_load(address, offset) for address, offset in places]
        least = functools.reduce(arith.minui, words)
        missing = arith.cmpi(arith.CmpIPredicate.eq, least, utils.c(0, _word()))
        scf.condition(missing, words)
    with ir.InsertionPoint.at_block_begin(loop.after.blocks.append(*kinds)):
        scf.yield_([])
    return list(loop.results)


def _load(address: ir.Value, offset: int) -> ir.Value:
    ptx = f"ld.relaxed.gpu.global.b32 $0, [$1+{4 * offset}];"
    return llvm.inline_asm(_word(), [address], ptx, "=r,l,~{memory}", has_side_effects=True)


def _store(address: ir.Value, words: list[ir.Value], exists: ir.Value) -> None:
    """One word, or two or four side by side."""
    count = len(words)
    values = ", ".join(f"${i + 1}" for i in range(count))
    wide, source = (f".v{count}", f"{{{values}}}") if count > 1 else ("", values)
    ptx = f"@${count + 1} st.relaxed.gpu.global{wide}.b32 [$0], {source};"
    constraints = ",".join(["l", *["r"] * count, "b", "~{memory}"])
    llvm.inline_asm(None, [address, *words, exists], ptx, constraints, has_side_effects=True)


def _address(ref: ir.Value, index: ir.Value) -> ir.Value:
    return utils.getelementptr(utils.memref_ptr(ref), [index], _word())


def _each(x: Any) -> Any:
    return ((at, _scalar(register)) for at, register in np.ndenumerate(x.registers))


def _numbers(register: ir.Value) -> list[ir.Value]:
    if not isinstance(register.type, ir.VectorType):
        return [register]
    return [vector.extract(register, [], [i]) for i in range(register.type.shape[0])]


def _scalar(register: ir.Value) -> ir.Value:
    return vector.extract(register, [], [0]) if isinstance(register.type, ir.VectorType) else register


def _times(x: ir.Value, factor: int) -> ir.Value:
    return arith.muli(x, utils.c(factor, _word()))


def _word() -> ir.Type:
    return ir.IntegerType.get_signless(32)

"""Scales of four K blocks in one load: bytes side by side in a row, as one word; for the interpreter, in jnp."""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.scales import LEAST_BITS, NAN_BITS

BYTES = 4  # of a word


def load_words(ref: Any, layout: Any) -> jax.Array:
    """int32 [rows], in `layout`, of uint8 ref [rows, 4] in device memory, rows at multiples of 4 bytes."""
    if is_interpreted():
        return _word_of([plgpu.load(ref.at[:, at], layout=layout, optimized=False) for at in range(BYTES)])
    return _load(ref, ref.shape[0], lambda ref: utils.c(_row_bytes(ref), _word()), layout)


def load_word(ref: Any, rows: int, layout: Any) -> jax.Array:
    """int32 [rows], in `layout`, each the word of uint8 ref [4] in device memory, at a multiple of 4 bytes.

    The compiler must not see that all threads load the same: it would keep the word in a uniform register, and those
    are filled at once, whatever the load takes. So rows are no bytes apart, a number that it does not know.
    """
    if is_interpreted():
        word = _word_of([ref[at] for at in range(BYTES)])
        return plgpu.layout_cast(jnp.broadcast_to(word, (rows,)), layout)
    return _load(ref, rows, lambda _: arith.shrui(utils.warpgroup_idx(sync=True), utils.c(5, _word())), layout)


def _load(ref: Any, rows: int, row_bytes: Any, layout: Any) -> jax.Array:
    found = plgpu.ShapeDtypeStruct((rows,), jnp.int32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=found)
    def run(_ctx: Any, ref: ir.Value) -> mgpu.FragmentedArray:
        apart, base, held = row_bytes(ref), utils.memref_ptr(ref), layout.to_mgpu()
        registers = np.empty(held.registers_shape((rows,)), dtype=object)
        for at, (row,) in zip(np.ndindex(*registers.shape), held.thread_idxs((rows,)), strict=True):
            start = arith.muli(arith.index_castui(_word(), row), apart)
            pointer = utils.getelementptr(base, [start], ir.IntegerType.get_signless(8))
            registers[at] = llvm.load(ir.VectorType.get((1,), _word()), pointer, alignment=BYTES)
        return mgpu.FragmentedArray(_registers=registers, _layout=held, _is_signed=True)

    return run(ref)


def bits_of(words: jax.Array, at: Any, least: Any) -> jax.Array:
    """float32's bits, int32, of the UE8M0 codes at one place of the words; `least`, where that is more."""
    left = 23 - 8 * at  # less than no way for the last place: so words are turned, not shifted
    turned = (words << (left & 31)) | lax.shift_right_logical(words, -left & 31)
    return jnp.maximum(turned & 0x7F800000, least)


def least_bits(words: jax.Array) -> jax.Array:
    """What `bits_of` words of weights takes: NaN where any of a word's four codes is that, so that one test does."""
    no_bits = ~words  # of a byte 255, the one code that is NaN
    found = (no_bits - 0x01010101) & words & -0x7F7F7F80  # the highest bit of a byte without bits, or of one above
    return jnp.where(found == 0, LEAST_BITS, NAN_BITS)


def _word_of(found: list[jax.Array]) -> jax.Array:
    return functools.reduce(operator.or_, (x.astype(jnp.int32) << (8 * at) for at, x in enumerate(found)))


def _row_bytes(ref: ir.Value) -> int:
    (apart, _), _ = ir.MemRefType(ref.type).get_strides_and_offset()
    return apart


def _word() -> ir.Type:
    return ir.IntegerType.get_signless(32)

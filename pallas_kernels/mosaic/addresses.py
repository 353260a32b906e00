"""Addresses in device memory, and what lies there: pieces of Mosaic for kernels that gather."""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

_LOAD = "ld.global"  # with .nc, what is loaded next would move before a fence, which waits for it


def load_words(address: ir.Value, count: int, seen: ir.Value | None = None) -> list[ir.Value]:
    """`count` words at an address in device memory; zeros, and no access, where not `seen`."""
    outputs = ", ".join(f"${i}" for i in range(count))
    wide, target = (f".v{count}", f"{{{outputs}}}") if count > 1 else ("", outputs)
    load = f"{_LOAD}{wide}.b32 {target}, [${count}];"
    operands, constraints = [address], ["=&r"] * count + ["l"]
    if seen is not None:
        zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(count))
        load = f"{{ .reg .pred p; setp.ne.b32 p, ${count + 1}, 0; {zeros} @p {load} }}"
        operands.append(arith.extui(i32(), seen))
        constraints.append("r")
    kind = llvm.StructType.get_literal([i32()] * count) if count > 1 else i32()
    found = llvm.inline_asm(kind, operands, load, ",".join(constraints), has_side_effects=True)
    return [llvm.extractvalue(i32(), found, [i]) for i in range(count)] if count > 1 else [found]


def behind(address: ir.Value, offset: int) -> ir.Value:
    return arith.addi(address, arith.constant(i64(), offset))


def address_of(array: ir.Value) -> ir.Value:
    return llvm.ptrtoint(i64(), utils.memref_ptr(array))


def times(number: ir.Value, factor: int) -> ir.Value:
    """number, which is not negative where it matters, times a constant, in 64 bits."""
    return arith.muli(arith.extsi(i64(), number), arith.constant(i64(), factor))


def scalar(register: ir.Value) -> ir.Value:
    if not isinstance(register.type, ir.VectorType):
        return register
    return vector.extract(register, [], [0])


def vector_of(values: list[ir.Value]) -> ir.Value:
    return vector.from_elements(ir.VectorType.get((len(values),), i32()), values)


def i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def constant(value: int) -> ir.Value:
    return arith.constant(i32(), value)


def fragmented(registers: np.ndarray, layout: Any, signed: bool | None = True) -> mgpu.FragmentedArray:
    return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=signed)

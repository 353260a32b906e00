"""A token's choice by each warp of a warpgroup, where Pallas knows vectors of whole warpgroups.

Vectors are [4, E], a row a warp, of which a lane has E / 32 neighbouring numbers; and [4, 32], a number a lane, of
which the first k are a token's choices. The interpreter's twins are in jnp.
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
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.mosaic.addresses import constant, fragmented, i32
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.warp import WARP, element, lane, sync_warp, warp
from pallas_kernels.router.warps_sm90 import k_best

TOKENS, EACH = 4, 4  # rows; numbers that a lane loads at a time
CHOICES = plgpu.Layout.TILED(plgpu.Tiling(((TOKENS, WARP), (1,))), (-3,), (-2,), -1)


def of_experts(count: int) -> Any:
    """Layout of [4, count]."""
    each = count // WARP
    if each == EACH:
        return plgpu.Layout.TILED(plgpu.Tiling(((TOKENS, count), (EACH,))), (-3,), (-2,), -1)
    return plgpu.Layout.TILED(plgpu.Tiling(((TOKENS, count), (each,), (EACH,))), (-4,), (-3,), -1)


def _choices(dtype: Any) -> Any:
    return plgpu.ShapeDtypeStruct((TOKENS, WARP), jnp.dtype(dtype), layout=CHOICES)


def best_of_each(keys: jax.Array, k: int) -> jax.Array:
    """int32 [4, 32]: the places of the k largest of int32 keys [4, E], in order; of equal ones the lower first."""
    if is_interpreted():
        return jnp.pad(lax.top_k(keys, k)[1], ((0, 0), (0, WARP - k)))

    @plgpu.inline_mgpu(arg_types=(of_experts(keys.shape[1]),), return_type=_choices(jnp.int32))
    def run(_ctx: Any, keys: Any) -> Any:
        first = arith.muli(lane(), constant(keys.shape[1] // WARP))
        numbers = [vector.extract(four, [], [i]) for four in keys.registers.ravel() for i in range(EACH)]
        held = [(key, arith.addi(first, constant(i))) for i, key in enumerate(numbers)]
        found = constant(0)
        for j, place in enumerate(k_best(held, k)):
            found = arith.select(arith.cmpi(arith.CmpIPredicate.eq, lane(), constant(j)), place, found)
        return _of_lanes(found, signed=True)

    return run(keys)


def given_of(given_gmem: Any, first: jax.Array, k: int) -> jax.Array:
    """int32 [4, 32]: the k experts of four tokens from `first` on, of int32 [N * k]."""
    if is_interpreted():
        return jnp.pad(given_gmem[pl.ds(first * k, TOKENS * k)].reshape(TOKENS, k), ((0, 0), (0, WARP - k)))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())), return_type=_choices(jnp.int32))
    def run(_ctx: Any, given: ir.Value, first: Any) -> Any:
        address = element(given, _place_of_choice(first, k))
        load = "{ .reg .pred p; setp.lt.u32 p, $2, $3; mov.b32 $0, 0; @p ld.global.b32 $0, [$1]; }"
        args = [address, lane(), constant(k)]
        return _of_lanes(llvm.inline_asm(i32(), args, load, "=&r,l,r,r", has_side_effects=True), signed=True)

    return run(given_gmem, first)


def look_up(scores_smem: Any, scores: jax.Array, places: jax.Array) -> jax.Array:
    """float32 [4, 32]: scores[t, places[t, j]] of float32 scores [4, E], by way of scores_smem [4, E]."""
    if is_interpreted():
        scores_smem[...] = scores
        return jnp.take_along_axis(scores, places, axis=1)
    pitch = scores.shape[1]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), of_experts(pitch), CHOICES),
        return_type=_choices(jnp.float32),
    )
    def run(_ctx: Any, smem: ir.Value, scores: Any, places: Any) -> Any:
        row = arith.muli(warp(), constant(pitch))
        own = arith.addi(row, arith.muli(lane(), constant(pitch // WARP)))
        sync_warp()
        for i, four in enumerate(scores.registers.ravel()):
            llvm.store(four, element(smem, arith.addi(own, constant(i * EACH))), alignment=16)
        sync_warp()
        (place,) = (vector.extract(register, [], [0]) for register in places.registers.ravel())
        return _of_lanes(llvm.load(ir.F32Type.get(), element(smem, arith.addi(row, place)), alignment=4))

    return run(scores_smem, scores, places)


def write(
    experts_gmem: Any,
    weights_gmem: Any,
    bins_smem: Any,
    experts: jax.Array,
    weights: jax.Array,
    first: jax.Array,
    tokens: int,
    k: int,
) -> None:
    """The first k of each row of both [4, 32], to [N * k], of four tokens from `first` on.

    bins_smem int32 [more than there are experts]: those of tokens that exist are counted; in the last bin what is no
    expert.
    """
    last = bins_smem.shape[0] - 1
    if is_interpreted():
        held = pl.ds(first * k, TOKENS * k)
        experts_gmem[held], weights_gmem[held] = experts[:, :k].reshape(-1), weights[:, :k].reshape(-1)
        there = (first + jnp.arange(TOKENS) < tokens)[:, None] & (experts[:, :k] >= 0)
        bins_smem[...] = bins_smem[...].at[jnp.where(there, jnp.minimum(experts[:, :k], last), last)].add(1)
        return

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * 3, CHOICES, CHOICES, plgpu.Layout.WG_SPLAT(())))
    def run(_ctx: Any, to_experts: Any, to_weights: Any, bins: Any, experts: Any, weights: Any, first: Any):
        (expert,), (weight,) = (
            [vector.extract(register, [], [0]) for register in x.registers.ravel()] for x in (experts, weights)
        )
        place = _place_of_choice(first, k)
        exists = arith.cmpi(arith.CmpIPredicate.ult, lane(), constant(k))
        for to, value, letter in ((to_experts, expert, "r"), (to_weights, weight, "f")):
            args = [element(to, place), value, exists]
            store = "@$2 st.global.b32 [$0], $1;"
            llvm.inline_asm(None, args, store, f"l,{letter},b,~{{memory}}", has_side_effects=True)
        token = arith.addi(first.registers.item(), warp())
        new = arith.andi(exists, arith.cmpi(arith.CmpIPredicate.slt, token, constant(tokens)))
        bin_ = arith.addi(
            llvm.ptrtoint(i32(), utils.memref_ptr(bins)), arith.shli(arith.minui(expert, constant(last)), constant(2))
        )
        add = "@$1 red.shared.add.u32 [$0], 1;"
        llvm.inline_asm(None, [bin_, new], add, "r,b,~{memory}", has_side_effects=True)

    run(experts_gmem, weights_gmem, bins_smem, experts, weights, first)


def _place_of_choice(first: Any, k: int) -> ir.Value:
    """Of the lane's choice of the warp's token, the first of the four being `first`, a lane beyond k having none."""
    token = arith.addi(first.registers.item(), warp())
    return arith.addi(arith.muli(token, constant(k)), lane())


def _of_lanes(value: ir.Value, signed: bool | None = None) -> Any:
    registers = np.empty(CHOICES.to_mgpu().registers_shape((TOKENS, WARP)), dtype=object)
    registers.flat = [vector.from_elements(ir.VectorType.get((1,), value.type), [value])]
    return fragmented(registers, CHOICES, signed)

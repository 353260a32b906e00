"""MXFP4 inside Hopper kernels, every group of 32 columns a product of its own: E2M1 as E4M3 by moving bits.

The sign, the two bits of the exponent and the one of the mantissa of E2M1, in the places of E4M3's sign, its lowest two
bits of exponent and its highest of mantissa, are the value over UNIT, zero and the subnormal 0.5 too: seven
instructions for eight codes, whatever their scales are. A K step of wgmma has the 32 columns that share a scale, and
an accumulator of its own: for few tokens the four times as many additions are fewer than what looking codes up, scales
folded in (e2m1_folded.py), takes beside.

The even columns of every 32 are a thread's share of the first 16 of a K step, the odd ones of the last 16. The other
operand has to be in this order (`evens_and_odds`). What Pallas has no word for is in e2m1_registers.py, with a twin in
jnp here for the interpreter.
"""

# Pallas's types cannot be followed.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAbstractUsage=false

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import e2m1_registers as registers
from pallas_kernels.mosaic.e2m1_folded import load_scale_words
from pallas_kernels.mosaic.e2m1_registers import BLOCK, GROUP, GROUPS, ROWS
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.scales import scale_bits

UNIT = 2.0**6  # a code is value / UNIT
PRODUCTS = plgpu.Layout.WGMMA
_MAGNITUDE, _SIGN = 0x1C, 0x80  # where those of E2M1 go in a byte of E4M3


def evens_and_odds(x: jax.Array) -> jax.Array:
    """x [..., K] with the columns of every 32 in the order that `spread` makes."""
    pairs = x.reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP // 2, 2)
    return jnp.swapaxes(pairs, -2, -1).reshape(x.shape)


def store_evens(codes_gmem: Any, codes: jax.Array, layout: Any) -> None:
    """codes_gmem [G, 128] becomes `evens_and_odds` of codes E4M3 [G, 128]; a thread has four neighbours or eight."""
    if is_interpreted():
        codes_gmem[...] = evens_and_odds(codes)
    else:
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))(registers.store_evens)(codes_gmem, codes)


def store_scales(tables_smem: Any, scale_smem: Any) -> None:
    """float32's bits of all scales of four blocks, UE8M0 uint8 [64, 16]; tables_smem int32 [64, 16 and more]."""
    word = load_scale_words(scale_smem)
    bits = [scale_bits((word >> (8 * group)) & 0xFF) for group in range(GROUPS)]
    if is_interpreted():
        tables_smem[:, pl.ds(0, GROUPS * word.shape[1])] = jnp.stack(bits, -1).reshape(ROWS, -1)
        return
    kinds = plgpu.RefType(), *[registers.EACH_BLOCK] * GROUPS
    plgpu.inline_mgpu(arg_types=kinds)(registers.store_scales)(tables_smem, *bits)


def load_scales(tables_smem: Any, block: Any) -> list[jax.Array]:
    """The bits of the four groups of a block, int32 [64] each."""
    of_block = tables_smem.at[:, pl.ds(GROUPS * block, GROUPS)]
    if is_interpreted():
        found = of_block[...]
        return [found[:, group] for group in range(GROUPS)]
    words = plgpu.ShapeDtypeStruct((ROWS,), jnp.int32, layout=registers.EACH_ROW)
    kinds = {"arg_types": (plgpu.RefType(),), "return_type": (words,) * GROUPS}
    return list(plgpu.inline_mgpu(**kinds)(registers.load_scales)(of_block))


def spread(packed: jax.Array, block: int) -> jax.Array:
    """E4M3 [64, 128], as wgmma's register operand, of one block of packed bytes uint8 [64, 64 blocks]."""
    if is_interpreted():
        pairs = packed[:, block * BLOCK // 2 : (block + 1) * BLOCK // 2].astype(jnp.int32)
        evens = (pairs << 2) & _MAGNITUDE | (pairs << 4) & _SIGN
        odds = (pairs >> 2) & _MAGNITUDE | pairs & _SIGN
        apart = jnp.stack([x.reshape(ROWS, GROUPS, GROUP // 2) for x in (evens, odds)], axis=2)
        return lax.bitcast_convert_type(apart.reshape(ROWS, BLOCK).astype(jnp.uint8), jnp.float8_e4m3fn)
    codes = plgpu.ShapeDtypeStruct((ROWS, BLOCK), jnp.float8_e4m3fn, layout=registers.CODES)
    in_mosaic = functools.partial(registers.spread, block, _MAGNITUDE, _SIGN)
    return plgpu.inline_mgpu(arg_types=(registers.CODES,), return_type=codes)(in_mosaic)(packed)


def start(codes: jax.Array, other_smem: Any) -> list[jax.Array]:
    """Issues four products float32 [64, n], of codes [64, 128] and other_smem [n, 128], swizzled; to be read behind
    `fresh_wgmma.wait`.

    The interpreter's wgmma reads memory only, and none of its operands is registers: there it is a product of XLA.
    """
    n = other_smem.shape[0]
    if is_interpreted():
        a, b = (x.astype(jnp.float32).reshape(-1, GROUPS, GROUP) for x in (codes, other_smem[...]))
        return list(jnp.einsum("mgk,ngk->gmn", a, b, precision="highest"))
    found = plgpu.ShapeDtypeStruct((ROWS, n), jnp.float32, layout=PRODUCTS)
    swizzled = plgpu.RefType((plgpu.TilingTransform((8, BLOCK)), plgpu.SwizzleTransform(BLOCK)))
    kinds = {"arg_types": (registers.CODES, swizzled), "return_type": (found,) * GROUPS}
    return list(plgpu.inline_mgpu(**kinds)(registers.multiply_groups)(codes, other_smem))

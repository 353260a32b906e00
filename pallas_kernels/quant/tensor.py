"""The quantised array every op takes, and its exact meaning in plain jnp.

Scales stay float8_e8m0fnu arrays: the type goes through jit, device_put, indexing and orbax unchanged, and
keeps a scale from being taken for an integer. Arithmetic never uses the type itself; it works on the codes.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, UInt8, UInt32

from pallas_kernels.quant.formats import FP8_BLOCK, MXFP4, QuantFormat
from pallas_kernels.typing import typed


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=["format"])
@dataclass(frozen=True)
class QuantTensor:
    """`x ~ values * scale`, a pytree whose leaves are the two stored arrays.

    values: codes as `format` stores them. scale: one element a tile. Leading axes (experts) are allowed. The
    fields may hold anything while a tree is mapped (shapes, shardings), so nothing is checked here: call
    `validate`.
    """

    values: Any
    scale: Any
    format: QuantFormat

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape, packing undone."""
        *leading, last = self.values.shape
        return (*leading, last * self.format.packing)

    @property
    def ndim(self) -> int:
        return len(self.values.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes stored, scales included."""
        return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in (self.values, self.scale))

    def validate(self) -> list[str]:
        """What is wrong with it, judged from shapes and dtypes alone; empty if nothing is."""
        fmt, problems = self.format, []
        for part, expected in (("values", fmt.values_dtype), ("scale", fmt.scale_dtype)):
            if (dtype := np.dtype(getattr(self, part).dtype)) != expected:
                problems.append(f"{part} are {dtype}, {fmt.name} stores {expected}")
        if self.ndim < 2:
            problems.append(f"values have shape {self.values.shape}, at least two axes are needed")
        elif tuple(self.scale.shape) != (expected := fmt.scale_shape(self.shape)):
            problems.append(
                f"scale has shape {self.scale.shape}, {fmt.name} of shape {self.shape} (tiles of "
                f"{fmt.tile[0]} x {fmt.tile[1]}) needs {expected}"
            )
        return problems


@typed
def dequantize(x: QuantTensor, dtype: DTypeLike = jnp.float32) -> Float[Array, "... out in"]:
    """The array `x` stands for: `values * scale`, exact in float32, then cast once to `dtype`.

    Integer arithmetic on the codes, because devices flush subnormals: the scale 2^-127 and the products below
    2^-126 would become zero (the device may still flush them in the cast to a narrower `dtype`). Products
    from 2^128 on are inf; scale code 255 and E4M3's NaN codes give NaN. Raises ValueError listing what
    `validate` finds.
    """
    if problems := x.validate():
        raise ValueError(f"not a {x.format.name} tensor: {'; '.join(problems)}")
    if x.format == MXFP4:
        values = _float32_bits_of_e2m1(_unpack_nibbles(x.values))
    elif x.format == FP8_BLOCK:
        values = jax.lax.bitcast_convert_type(x.values.astype(jnp.float32), jnp.uint32)
    else:
        raise ValueError(f"no decoder for format {x.format.name}: {FP8_BLOCK.name} and {MXFP4.name} have one")
    codes = jax.lax.bitcast_convert_type(x.scale, jnp.uint8)
    bits = _times_power_of_two(values, _spread(codes, x.format.tile, x.shape).astype(jnp.int32))
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(dtype)


def _unpack_nibbles(packed: UInt8[Array, "... half"]) -> UInt8[Array, "... full"]:
    """[..., n/2] bytes -> [..., n] codes, LOW nibble first."""
    pairs = jnp.stack([packed & 15, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def _float32_bits_of_e2m1(codes: UInt8[Array, "..."]) -> UInt32[Array, "..."]:
    """Bits `s ee m`: magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6. Code 1 is the format's only subnormal."""
    codes = codes.astype(jnp.uint32)
    magnitude = codes & 7
    normal = ((magnitude >> 1) + 126) << 23 | (magnitude & 1) << 22
    small = jnp.where(magnitude == 1, jnp.uint32(126 << 23), jnp.uint32(0))
    return (codes >> 3) << 31 | jnp.where(magnitude < 2, small, normal)


def _spread(codes: UInt8[Array, "... tr tc"], tile: tuple[int, int], shape: tuple[int, ...]) -> UInt8[Array, "... r c"]:
    """One code a tile -> one an element of `shape`; the last tile of an axis is cut where it is partial."""
    for axis, width in zip((-2, -1), tile, strict=True):
        codes = jnp.repeat(codes, width, axis=axis) if width > 1 else codes
    return codes[..., : shape[-2], : shape[-1]]


def _times_power_of_two(values: UInt32[Array, "..."], codes: Int32[Array, "..."]) -> UInt32[Array, "..."]:
    """Float32 bits of `value * 2^(code - 127)`; `values` are float32 bits of zero, NaN or a normal number.

    E4M3 has four significant bits and no magnitude below 2^-9, so that a result below 2^-126 is shifted right
    by at most 10 places and loses none of them.
    """
    sign, fraction = values & np.uint32(1 << 31), values & np.uint32((1 << 23) - 1)
    field = ((values >> 23) & 255).astype(jnp.int32)
    exponent = field + codes - 127
    normal = exponent.astype(jnp.uint32) << 23 | fraction
    subnormal = (fraction | np.uint32(1 << 23)) >> jnp.clip(1 - exponent, 0, 31).astype(jnp.uint32)
    magnitude = jnp.where(exponent > 0, normal, subnormal)
    magnitude = jnp.where(exponent > 254, jnp.uint32(255 << 23), magnitude)
    magnitude = jnp.where(field == 0, jnp.uint32(0), magnitude)
    nan = (field == 255) | (codes == 255)
    return jnp.where(nan, jnp.uint32(0x7FC00000), sign | magnitude)

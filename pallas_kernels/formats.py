"""What quantised numbers look like in memory, as values: element types, tiles, scales, cached rows.

One convention for all of them: `x ~ values * scale`. Nothing is imported, so that configs and byte counts can use it.

| element | stored as | largest | smallest step | codes a byte |
|---|---|---|---|---|
| e4m3 | float8_e4m3fn | 448 | 2^-9 | 1 |
| e5m2 | float8_e5m2 | 57344 | 2^-16 | 1 |
| int8 | int8 | 127 | 1 | 1 |
| e2m1 | uint8, LOW nibble first | 6 | 2^-1 | 2 |
"""

from __future__ import annotations

import functools
import math
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

Element = Literal["e4m3", "e5m2", "int8", "e2m1"]
ScaleType = Literal["float32", "bfloat16", "ue8m0"]
Rounding = Literal["nearest", "stochastic"]
Plain = Literal["float32", "bfloat16"]
Tile = tuple[int | None, int | None]


class FormatError(ValueError):
    """A format that does not exist, or a shape that a format cannot hold."""


@dataclass(frozen=True)
class ElementType:
    """A code: `largest` magnitude, `mantissa` bits after the leading one, and the exponent where its grid ends.

    The step between neighbours is 2^(max(exponent of x, lowest) - mantissa); a `uniform` element has one step of 1.
    """

    dtype: str
    largest: float
    mantissa: int
    lowest: int
    packing: int = 1
    uniform: bool = False


ELEMENTS: dict[Element, ElementType] = {
    "e4m3": ElementType("float8_e4m3fn", 448.0, 3, -6),
    "e5m2": ElementType("float8_e5m2", 57344.0, 2, -14),
    "int8": ElementType("int8", 127.0, 0, 0, uniform=True),  # -128 is never written
    "e2m1": ElementType("uint8", 6.0, 1, 0, packing=2),
}
# Scale type -> dtype and its bytes. A stored value is one byte in every format.
SCALES: dict[ScaleType, tuple[str, int]] = {
    "float32": ("float32", 4),
    "bfloat16": ("bfloat16", 2),
    "ue8m0": ("float8_e8m0fnu", 1),
}
SMALLEST_NORMAL = 2.0**-126
_TILE_NAMES: dict[str, Tile] = {"tensor": (None, None), "row": (1, None)}


@dataclass(frozen=True)
class QuantFormat:
    """One format. Frozen and hashable, so that it can be static data of a pytree.

    tile: logical elements (rows, columns of the last two axes) that share one scale; None is the whole axis. A weight
    [out, in] has one scale a channel, activations [tokens, in] one a token, with the tile (1, None). Tiles start at
    index 0. Square tiles may be partial at both edges; tiles of one row must divide the columns.
    scale: type of the scales. ue8m0 holds powers of two only, and the largest magnitude of a tile over the element's
    largest is rounded UP to one; `power_of_two` does the same for the other types.
    rounding: of codes; nearest is to even. floor: tiles whose largest magnitude is below count as if it were this.
    None: the least that keeps a scale a normal float32.
    """

    element: Element
    tile: Tile
    scale: ScaleType = "float32"
    rounding: Rounding = "nearest"
    floor: float | None = None
    power_of_two: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("element", Element), ("scale", ScaleType), ("rounding", Rounding)):
            if (value := getattr(self, name)) not in typing.get_args(kind):
                raise FormatError(f"{name} is {value!r}: one of {', '.join(typing.get_args(kind))}")
        if len(self.tile) != 2 or any(side is not None and side < 1 for side in self.tile):
            raise FormatError(f"tile is {self.tile}: (rows, columns), each at least 1 or None for the whole axis")
        if self.tile[1] is not None and self.tile[1] % self.packing:
            raise FormatError(f"tile is {self.tile}: {self.element} puts {self.packing} codes of a row in one byte")
        least = self.largest * SMALLEST_NORMAL
        if self.floor is not None and not least <= self.floor <= self.amax_ceiling:
            raise FormatError(f"floor is {self.floor}: from {least:.3g} to {self.amax_ceiling:.3g}, or None")
        if self.scale == "ue8m0":
            object.__setattr__(self, "power_of_two", True)

    @property
    def name(self) -> str:
        """`element:tile:scale`, which `parse_format` reads; rounding and floor change no stored layout."""
        return f"{self.element}:{_tile_name(self.tile)}:{self.scale}"

    @property
    def layout(self) -> tuple[Element, Tile, ScaleType]:
        """What decides how stored arrays are read."""
        return self.element, self.tile, self.scale

    @property
    def values_dtype(self) -> np.dtype:
        return _dtype(ELEMENTS[self.element].dtype)

    @property
    def scale_dtype(self) -> np.dtype:
        return _dtype(SCALES[self.scale][0])

    @property
    def packing(self) -> int:
        """Codes in one stored value, along the last axis, lowest bits first."""
        return ELEMENTS[self.element].packing

    @property
    def largest(self) -> float:
        return ELEMENTS[self.element].largest

    @property
    def amax_floor(self) -> float:
        return self.largest * SMALLEST_NORMAL if self.floor is None else self.floor

    @property
    def amax_ceiling(self) -> float:
        """The largest magnitude times the largest power of two such that float32 holds the product: tiles saturate
        there. With a larger scale, 3.4e38 would round up to 2^128, which is infinity.
        """
        _, exponent = math.frexp(self.largest)
        return self.largest * 2.0 ** (128 - exponent)

    def unsupported_reason(self, shape: tuple[int, ...]) -> str | None:
        """Why a logical `shape` cannot be held; None if it can."""
        if len(shape) < 2:
            return f"shape {shape} has fewer than two axes"
        rows, columns = self.tile
        if shape[-1] % self.packing:
            return f"the last axis of {shape} is not a multiple of {self.packing} ({self.packing} codes a byte)"
        if rows == 1 and columns is not None and shape[-1] % columns:
            return f"tiles of 1 x {columns} do not divide the last axis of {shape}"
        return None

    def values_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored values of a logical `shape`. Raises FormatError where it cannot be held."""
        self._require(shape)
        return (*shape[:-1], shape[-1] // self.packing)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a logical `shape`: one a tile, partial tiles included."""
        self._require(shape)
        sides = (1 if side is None else -(-size // side) for side, size in zip(self.tile, shape[-2:], strict=True))
        return (*shape[:-2], *sides)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of values and scales of a logical `shape`."""
        return math.prod(self.values_shape(shape)) + math.prod(self.scale_shape(shape)) * SCALES[self.scale][1]

    def _require(self, shape: tuple[int, ...]) -> None:
        if reason := self.unsupported_reason(shape):
            raise FormatError(f"{self.name} cannot hold this: {reason}")


def parse_format(text: str) -> QuantFormat | None:
    """A named format of FORMATS, `plain` (None), or one spelled out: `e4m3:1x128:ue8m0`. Raises FormatError."""
    if text == "plain":
        return None
    if text in FORMATS:
        return FORMATS[text]
    element, *rest = text.split(":")
    if len(rest) != 2:
        raise FormatError(f"no format {text!r}: plain, {', '.join(FORMATS)}, or ELEMENT:TILE:SCALE as e4m3:1x128:ue8m0")
    tile, scale = rest
    try:
        sides = _TILE_NAMES.get(tile) or tuple(None if side == "all" else int(side) for side in tile.split("x"))
        form = QuantFormat(typing.cast(Element, element), typing.cast(Tile, sides), typing.cast(ScaleType, scale))
    except ValueError as error:
        raise FormatError(f"no format {text!r}: {error}") from None
    return next((known for known in FORMATS.values() if known.layout == form.layout), form)


def format_name(form: QuantFormat | None) -> str:
    """The shortest text that `parse_format` reads as the layout of `form`."""
    if form is None:
        return "plain"
    return next((name for name, known in FORMATS.items() if known.layout == form.layout), form.name)


@functools.cache
def _dtype(name: str) -> np.dtype:
    import ml_dtypes  # here, not above: who only counts bytes waits for no numpy
    import numpy as np

    return np.dtype(getattr(ml_dtypes, name, name))


def _tile_name(tile: Tile) -> str:
    for name, sides in _TILE_NAMES.items():
        if sides == tile:
            return name
    return "x".join("all" if side is None else str(side) for side in tile)


ACTIVATION_FLOOR = 1e-4  # of the released code: the largest magnitude of a tile, not the scale
FP8_BLOCK = QuantFormat("e4m3", (128, 128), "ue8m0", floor=ACTIVATION_FLOOR)
FP8_GROUP = QuantFormat("e4m3", (1, 128), "ue8m0", floor=ACTIVATION_FLOOR)  # activations
FP8_ENTRY = QuantFormat("e4m3", (1, 64), "ue8m0", floor=ACTIVATION_FLOOR)  # cached entries
MXFP4 = QuantFormat("e2m1", (1, 32), "ue8m0")
# What files and command lines call them. fp8 and fp4 are the released formats of weights.
FORMATS: dict[str, QuantFormat] = {
    "fp8": FP8_BLOCK,
    "fp4": MXFP4,
    "fp8_group": FP8_GROUP,
    "fp8_entry": FP8_ENTRY,
    "fp8_tensor": QuantFormat("e4m3", (None, None)),
    "fp8_row": QuantFormat("e4m3", (1, None)),
    "e5m2": QuantFormat("e5m2", (128, 128), "ue8m0", floor=ACTIVATION_FLOOR),
    "e5m2_group": QuantFormat("e5m2", (1, 128), "ue8m0", floor=ACTIVATION_FLOOR),
    "int8_tensor": QuantFormat("int8", (None, None)),
    "int8_row": QuantFormat("int8", (1, None)),
}

"""How one row of a cache is laid out: window and compressed entries, index keys.

Nothing heavy is imported, as in `pallas_kernels.formats`.
"""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels.formats import ACTIVATION_FLOOR, FORMATS, FP8_ENTRY, MXFP4, SCALES, FormatError, Plain, QuantFormat


@dataclass(frozen=True)
class RowFormat:
    """How one row of channels lies in a cache: plain, or its leading channels quantised and the last `tail` in bf16.

    quant: tiles of one row, None for a plain row. scales: bytes a row reserves for its scales are a multiple of
    `scale_align`. fixed_scale: one scale for every row instead of stored ones. hadamard: rows are rotated before
    (queries must be rotated alike).
    """

    quant: QuantFormat | None = None
    plain: Plain = "bfloat16"
    tail: int = 0
    scale_align: int = 1
    fixed_scale: float | None = None
    hadamard: bool = False

    def unsupported_reason(self, width: int) -> str | None:
        """Why rows of `width` channels cannot be held; None if they can."""
        if self.quant is None:
            return None
        if width <= self.tail:
            return f"{width} channels of which {self.tail} stay bfloat16 leave none to quantise"
        if (width - self.tail) % self.quant.packing:
            return f"{width - self.tail} channels, {self.quant.element} puts {self.quant.packing} of a row in one byte"
        return None

    def nbytes(self, width: int) -> int:
        """Bytes of a row of `width` channels, reserved ones included."""
        if self.quant is None:
            return width * (4 if self.plain == "float32" else 2)
        codes = -(-(width - self.tail) // self.quant.packing)
        return codes + 2 * self.tail + self.scales(width) * SCALES[self.quant.scale][1]

    def scales(self, width: int) -> int:
        """Scales a row stores, reserved ones included."""
        if self.quant is None or self.fixed_scale is not None:
            return 0
        columns = self.quant.tile[1]
        count = 1 if columns is None else -(-(width - self.tail) // columns)
        return -(-count // self.scale_align) * self.scale_align


def entry_format(kind: str, rope_dim: int) -> RowFormat:
    """How window and compressed entries are cached. fp8 is the interchange format: rotary channels stay bf16.

    fp8_tensor has one scale, 1, for everything: an entry comes out of an RMSNorm, so that its magnitudes lie well
    inside what E4M3 resolves (2^-9 to 448). Raises FormatError.
    """
    match kind:
        case "float32" | "bfloat16":
            return RowFormat(plain=kind)
        case "fp8":
            return RowFormat(FP8_ENTRY, tail=rope_dim, scale_align=8)
        case "fp8_tensor":
            return RowFormat(FORMATS["fp8_tensor"], fixed_scale=1.0)
        case "int8":
            return RowFormat(FORMATS["int8_row"])
    raise FormatError(f"cached entries cannot be {kind!r}: {', '.join(ENTRY_KINDS)}")


def index_format(kind: str) -> RowFormat:
    """How index keys are cached; the quantised ones are Hadamard-rotated first. Raises FormatError."""
    match kind:
        case "float32" | "bfloat16":
            return RowFormat(plain=kind)
        case "fp8":
            form = QuantFormat("e4m3", (1, None), "float32", floor=ACTIVATION_FLOOR, power_of_two=True)
            return RowFormat(form, hadamard=True)
        case "fp4":
            return RowFormat(MXFP4, hadamard=True)
    raise FormatError(f"index keys cannot be {kind!r}: {', '.join(INDEX_KINDS)}")


ENTRY_KINDS = ("float32", "bfloat16", "fp8", "fp8_tensor", "int8")
INDEX_KINDS = ("float32", "bfloat16", "fp8", "fp4")

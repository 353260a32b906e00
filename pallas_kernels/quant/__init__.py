"""Quantised arrays: a format is a value, a quantised tensor is a pytree of codes and scales, exact to the bit."""

from pallas_kernels.formats import FORMATS, FP8_BLOCK, FP8_ENTRY, FP8_GROUP, MXFP4, FormatError, QuantFormat
from pallas_kernels.quant.convert import dequantize, quantize, round_trip
from pallas_kernels.quant.exact import mxfp4_to_fp8
from pallas_kernels.quant.paged import Pages, outline, paged, take_paged
from pallas_kernels.quant.rows import Rows, as_cached, decode_rows, empty_rows, encode_rows, take_rows
from pallas_kernels.quant.tensor import QuantTensor
from pallas_kernels.quant.weights import ObservedWeight, TreatedWeight, observe
from pallas_kernels.row_format import RowFormat

__all__ = [
    "FORMATS",
    "FP8_BLOCK",
    "FP8_ENTRY",
    "FP8_GROUP",
    "MXFP4",
    "FormatError",
    "ObservedWeight",
    "Pages",
    "QuantFormat",
    "QuantTensor",
    "RowFormat",
    "Rows",
    "TreatedWeight",
    "as_cached",
    "decode_rows",
    "dequantize",
    "empty_rows",
    "encode_rows",
    "mxfp4_to_fp8",
    "observe",
    "outline",
    "paged",
    "quantize",
    "round_trip",
    "take_paged",
    "take_rows",
]

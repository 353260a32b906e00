"""Block-quantised arrays: a format is a value, a quantised tensor is a pytree of codes and scales."""

from pallas_kernels.quant.formats import FORMATS, FP8_BLOCK, MXFP4, QuantFormat
from pallas_kernels.quant.tensor import QuantTensor, dequantize

__all__ = ["FORMATS", "FP8_BLOCK", "MXFP4", "QuantFormat", "QuantTensor", "dequantize"]

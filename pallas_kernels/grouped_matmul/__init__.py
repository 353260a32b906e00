"""Expert layers: rows sorted by expert, one weight matrix an expert."""

from pallas_kernels.grouped_matmul.api import grouped_matmul

__all__ = ["grouped_matmul"]

"""Expert layers: rows sorted by expert, one weight matrix an expert."""

from pallas_kernels.grouped_matmul.api import experts

__all__ = ["experts"]

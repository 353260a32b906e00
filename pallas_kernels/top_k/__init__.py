"""Deterministic selection of the best entries."""

from pallas_kernels.top_k.api import top_k

__all__ = ["top_k"]

"""Attention of each query to its own list of entries: a window and a selection of compressed ones."""

from pallas_kernels.sparse_attention.api import sparse_attention, sparse_attention_prefill

__all__ = ["sparse_attention", "sparse_attention_prefill"]

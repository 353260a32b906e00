"""Indexer scores: which compressed entries matter to a query."""

from pallas_kernels.index_scores.api import index_scores

__all__ = ["index_scores"]

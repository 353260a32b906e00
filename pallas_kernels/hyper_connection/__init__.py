"""Manifold-constrained hyper-connections (mHC): n residual streams mixed by doubly stochastic matrices."""

from pallas_kernels.hyper_connection.api import Mix, head, post, pre, pre_quantize_rows

__all__ = ["Mix", "head", "post", "pre", "pre_quantize_rows"]

"""Dense linear layers: x @ w.T with [out, in] weights, plain or quantised."""

from pallas_kernels.block_matmul.api import block_diagonal_matmul, matmul

__all__ = ["block_diagonal_matmul", "matmul"]

"""The Hopper kernel as an implementation of `compress`."""

from __future__ import annotations

from typing import Any

from pallas_kernels.compress.reference import CompressorState
from pallas_kernels.compress.tiling import unsupported_reason
from pallas_kernels.quant.rows import Rows

__all__ = ["compress_into", "unsupported_reason"]


def compress_into(*arguments: Any, norm_eps: float) -> tuple[Rows, CompressorState]:
    """`reference.compress_into`."""
    from pallas_kernels.compress import kernel_sm90  # here: who runs no kernel does not wait for Pallas

    return kernel_sm90.compress_into(*arguments, norm_eps=norm_eps)

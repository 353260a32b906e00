"""The peers' kernels (DeepGEMM) on the same shapes: the one file here that imports torch.

`directory` holds what the peers' wheels unpack to. A kind of kernel is a function of torch and the sizes that gives
(maker of an input set, call on one).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pallas_kernels.bench.timing import input_sets, microseconds

Peer = tuple[Callable[[], Any], Callable[[Any], None]]


def time_peer(directory: Path, peer: tuple[Any, ...], nbytes: int) -> float:
    """Microseconds of the peer on the case it knows by `peer` (its kind, then sizes). Raises ImportError."""
    import torch  # pyright: ignore[reportMissingImports]

    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
    kind, *sizes = peer
    make, call = {"gemm": _gemm, "masked": _masked, "contiguous": _contiguous}[kind](torch, *sizes)
    sets = []
    try:
        sets.extend(make() for _ in range(input_sets(nbytes)))
        return microseconds(call, sets, torch.cuda.synchronize)
    finally:
        sets.clear()
        torch.cuda.empty_cache()


def _gemm(torch: Any, m: int, n: int, k: int) -> Peer:
    import deep_gemm  # pyright: ignore[reportMissingImports]

    def make() -> Any:
        return _rows(torch, m, k), _weights(torch, n, k), _empty(torch, m, n)

    return make, lambda sets: deep_gemm.fp8_gemm_nt(*sets, disable_ue8m0_cast=True)


def _masked(torch: Any, experts: int, rows: int, n: int, k: int) -> Peer:
    """`rows` for each of `experts`, in buffers of 128 rows or more."""
    import deep_gemm  # pyright: ignore[reportMissingImports]

    most = -(-rows // 128) * 128

    def make() -> Any:
        counts = torch.full((experts,), rows, device="cuda", dtype=torch.int32)
        return _rows(torch, experts, most, k), _weights(torch, experts, n, k), _empty(torch, experts, most, n), counts

    return make, lambda sets: deep_gemm.m_grouped_fp8_gemm_nt_masked(*sets, rows, disable_ue8m0_cast=True)


def _contiguous(torch: Any, experts: int, rows: int, n: int, k: int) -> Peer:
    """`rows` (a multiple of 128) for each of `experts`, sorted."""
    import deep_gemm  # pyright: ignore[reportMissingImports]

    def make() -> Any:
        expert = torch.arange(experts, device="cuda", dtype=torch.int32).repeat_interleave(rows)
        m = experts * rows
        return _rows(torch, m, k), _weights(torch, experts, n, k), _empty(torch, m, n), expert

    return make, lambda sets: deep_gemm.m_grouped_fp8_gemm_nt_contiguous(*sets, disable_ue8m0_cast=True)


def _rows(torch: Any, *shape: int) -> tuple[Any, Any]:
    *leading, k = shape
    codes = torch.randn(*shape, device="cuda", dtype=torch.bfloat16).to(torch.float8_e4m3fn)
    return codes, torch.rand(*leading, k // 128, device="cuda")


def _weights(torch: Any, *shape: int) -> tuple[Any, Any]:
    """[..., n, k] and its scales, one expert at a time: as bfloat16 all of them take more than is left."""
    *leading, n, k = shape
    codes = torch.empty(shape, device="cuda", dtype=torch.float8_e4m3fn)
    for matrix in codes.view(-1, n, k):
        matrix.copy_(torch.randn(n, k, device="cuda", dtype=torch.bfloat16))
    return codes, torch.rand(*leading, n // 128, k // 128, device="cuda")


def _empty(torch: Any, *shape: int) -> Any:
    return torch.empty(*shape, device="cuda", dtype=torch.bfloat16)

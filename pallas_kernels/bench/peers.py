"""The peers' kernels (DeepGEMM) on the same shapes: the one file here that imports torch.

`directory` holds what the peers' wheels unpack to. A call is (function of an input set, input sets, wait).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pallas_kernels.bench.timing import input_sets, microseconds


def time_peer(directory: Path, peer: tuple[Any, ...], nbytes: int) -> float:
    """Microseconds of the peer on the case it knows by `peer` (its kind, then sizes). Raises ImportError."""
    import torch  # pyright: ignore[reportMissingImports]

    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
    kind, *sizes = peer
    make, call = {"gemm": _gemm}[kind](torch, *sizes)
    sets = [make() for _ in range(input_sets(nbytes))]
    try:
        return microseconds(call, sets, torch.cuda.synchronize)
    finally:
        del sets
        torch.cuda.empty_cache()


def _gemm(torch: Any, m: int, n: int, k: int) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    import deep_gemm  # pyright: ignore[reportMissingImports]

    fp8 = torch.float8_e4m3fn

    def make() -> Any:
        x = torch.randn(m, k, device="cuda").to(fp8), torch.rand(m, k // 128, device="cuda")
        w = (
            torch.randn(n, k, device="cuda", dtype=torch.bfloat16).to(fp8),
            torch.rand(n // 128, k // 128, device="cuda"),
        )
        return x, w, torch.empty(m, n, device="cuda", dtype=torch.bfloat16)

    return make, lambda sets: deep_gemm.fp8_gemm_nt(*sets, disable_ue8m0_cast=True)

"""The peers' kernels (DeepGEMM, FlashMLA) on the same shapes: the one file here that imports torch.

`directory` holds what `peer_files` says. A kind of kernel is a function of torch and the sizes that gives
(maker of an input set, call on one).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pallas_kernels.bench.peer_files import FLASHMLA
from pallas_kernels.bench.timing import input_sets, microseconds

Peer = tuple[Callable[[], Any], Callable[[Any], None]]


def time_peer(directory: Path, peer: tuple[Any, ...], nbytes: int) -> float:
    """Microseconds of the peer on the case it knows by `peer` (its kind, then sizes). Raises ImportError."""
    import torch  # pyright: ignore[reportMissingImports]

    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
    kind, *sizes = peer
    kinds = {
        "gemm": _gemm,
        "masked": _masked,
        "contiguous": _contiguous,
        "index": _index,
        "hc": _hc,
        "flashmla": _flashmla,
    }
    make, call = kinds[kind](torch, *sizes)
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


def _index(torch: Any, batch: int, tokens: int, entries: int, heads: int, width: int, page: int) -> Peer:
    """Scores of `entries` FP8 keys of each sequence, in pages in random order; the peer's schedule is made before."""
    import deep_gemm  # pyright: ignore[reportMissingImports]

    pages = batch * entries // page

    def make() -> Any:
        q = torch.randn(batch, tokens, heads, width, device="cuda").to(torch.float8_e4m3fn)
        keys = torch.randint(0, 100, (pages, page, 1, width + 4), device="cuda", dtype=torch.uint8)
        weights = torch.randn(batch * tokens, heads, device="cuda")
        counts = torch.full((batch, tokens), entries, device="cuda", dtype=torch.int32)
        table = torch.randperm(pages, device="cuda", dtype=torch.int32).view(batch, -1)
        schedule = deep_gemm.get_paged_mqa_logits_metadata(counts, page, deep_gemm.get_num_sms())
        return (q, None), keys, weights, counts, table, schedule, entries

    return make, lambda sets: deep_gemm.fp8_fp4_paged_mqa_logits(*sets, clean_logits=False)


def _hc(torch: Any, m: int, k: int) -> Peer:
    """The products of mHC's `pre` and the sums of squares, of 16 parts of k each, which something else has to add."""
    import deep_gemm  # pyright: ignore[reportMissingImports]

    mixed, splits = 24, 16

    def make() -> Any:
        streams = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        fn = torch.randn(mixed, k, device="cuda")
        return streams, fn, torch.empty(splits, m, mixed, device="cuda"), torch.empty(splits, m, device="cuda")

    return make, lambda sets: deep_gemm.tf32_hc_prenorm_gemm(*sets, num_splits=splits)


def _flashmla(torch: Any, batch: int, tokens: int, heads: int, window: int, top: int) -> Peer:
    """Sparse decode attention over entries of two pools; its schedule is made at the first call."""
    library = next((Path(p) / FLASHMLA for p in sys.path if (Path(p) / FLASHMLA).exists()), None)
    if library is None:
        raise ImportError(f"no {FLASHMLA} in the peers' directory")
    torch.ops.load_library(str(library))
    decode = torch.ops._flashmla_C.sparse_decode_fwd
    sizes = [max(batch, 32) * entries for entries in (256, 16384)]  # more than the L2 cache holds
    window_pool, pool = _entries(torch, sizes[0], 256), _entries(torch, sizes[1], 64)
    sink = torch.zeros(heads, device="cuda")

    def make() -> Any:
        q = torch.randn(batch, tokens, heads, 512, device="cuda", dtype=torch.bfloat16)
        named = [
            torch.randint(0, entries, (batch, tokens, count), device="cuda", dtype=torch.int32)
            for entries, count in zip(sizes, (window, top), strict=True)
        ]
        return q, *named, [None, None]

    def call(sets: Any) -> None:
        q, window_index, index, schedule = sets
        _, _, schedule[0], schedule[1] = decode(
            q, window_pool, window_index, None, sink, *schedule, pool, index, None, 512, 512**-0.5, None
        )

    return make, call


def _entries(torch: Any, entries: int, page: int) -> Any:
    """Pages of random entries in the interchange layout, [pages, page, 1, 584] over padded storage."""
    pages, stride = entries // page, -(-page * 584 // 576) * 576
    raw = torch.randint(0, 120, (pages, stride), device="cuda", dtype=torch.uint8)
    raw[:, page * 576 : page * 584] = 120  # scales of 2^-7
    rotary = torch.randn(pages, page, 64, device="cuda", dtype=torch.bfloat16)
    raw[:, : page * 576].view(pages, page, 576)[:, :, 448:] = rotary.view(torch.uint8).view(pages, page, 128)
    return raw.view(torch.float8_e4m3fn).as_strided((pages, page, 1, 584), (stride, 584, 584, 1))


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

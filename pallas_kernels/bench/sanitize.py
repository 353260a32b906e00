"""Runs every kernel on small shapes and checks it: what to run under compute-sanitizer, which slows everything down.

export XLA_PYTHON_CLIENT_PREALLOCATE=false  # else every access lies in one allocation
export XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_command_buffer= --xla_gpu_force_compilation_parallelism=1"
compute-sanitizer --show-backtrace no --tool memcheck python -m pallas_kernels.bench.sanitize [OP [CASE [TILING]]]
compute-sanitizer --show-backtrace no --tool racecheck --kernel-name kns=mosaic python -m pallas_kernels.bench.sanitize

OP: the kernels of one op alone. CASE: of them, the cases whose names begin like that. TILING: the tilings with this in
their name, instead of the first two and the last. Without these flags, or with many cases in one process, the tool dies
of its own accord, with status 139.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import jax

from pallas_kernels.bench import (
    block_matmul,
    compress,
    expert_layer,
    grouped_matmul,
    hyper_connection,
    index_scores,
    mxfp4,
    quantize_rows,
    router,
    sparse_attention,
    sparse_attention_prefill,
    top_k,
    weight_only,
)
from pallas_kernels.bench.case import Bench
from pallas_kernels.block_matmul.cases import MatmulCase
from pallas_kernels.compress.cases import SMALL
from pallas_kernels.formats import FP8_GROUP
from pallas_kernels.grouped_matmul.cases import GroupedCase, LayerCase
from pallas_kernels.hyper_connection.cases import HyperCase
from pallas_kernels.index_scores.cases import ScoreCase
from pallas_kernels.quantize_rows.cases import RowsCase
from pallas_kernels.router.cases import RouterCase
from pallas_kernels.sparse_attention.cases import DecodeCase
from pallas_kernels.sparse_attention.prefill_cases import PrefillCase
from pallas_kernels.top_k.cases import TopKCase

MOST = 3  # tilings of a case: the first, and the last


def cases() -> Iterator[Bench]:
    yield from (block_matmul.bench(MatmulCase(f"m={m}", m, 512, 512)) for m in (3, 128, 512))
    # More tiles than thread blocks.
    yield block_matmul.bench(MatmulCase("many tiles", 1152, 4608, 512))
    yield grouped_matmul.bench(GroupedCase("many clusters", 200, 4608, 512, (256,), experts=5, hit=4))
    yield from (weight_only.bench(weight_only.WeightOnlyCase(f"weight-only m={m}", m, 256, 512, 2)) for m in (3, 130))
    yield grouped_matmul.bench(GroupedCase("few rows", 3, 512, 512, (8,), experts=3, hit=2))
    yield grouped_matmul.bench(GroupedCase("many rows", 130, 256, 512, (128,), 2, experts=3, hit=2))
    yield grouped_matmul.bench(GroupedCase("rows of clusters", 200, 512, 512, (256,), experts=3, hit=2))
    yield expert_layer.bench(LayerCase("layer", 5, 512, 512, 4, 2))
    yield expert_layer.bench(LayerCase("layer of many rows", 200, 512, 512, 3, 2))
    yield expert_layer.bench(LayerCase("mxfp4 layer", 5, 512, 512, 4, 2, mxfp4=True))
    for name, packed in (("layer of one token", False), ("mxfp4 layer of one token", True)):
        yield expert_layer.bench(LayerCase(name, 1, 1024, 512, 4, 2, mxfp4=packed))
    yield mxfp4.bench(GroupedCase("mxfp4", 3, 256, 1024, (8,), experts=3, hit=3))
    yield mxfp4.bench(GroupedCase("mxfp4 of two weights", 9, 128, 512, (16,), 2, experts=3, hit=3))
    yield from (quantize_rows.bench(RowsCase(f"normed={normed}", 5, 512, normed)) for normed in (False, True))
    yield index_scores.bench(ScoreCase("scores", 3, 2, 200, 8, 64))
    yield index_scores.bench(ScoreCase("fp4 scores", 3, 2, 200, 8, 64, keys="fp4"))
    yield from map(compress.bench, SMALL)
    for batch, window in ((3, 300), (40, 300), (70, 300)):  # the kernel for few, divided and not, and that for many
        yield sparse_attention.bench(DecodeCase(f"attention {batch} x 2, {window} + 70", 64, batch, 2, 70, window))
    yield sparse_attention_prefill.bench(PrefillCase("prefill", 5, 70, 20))
    yield from (top_k.bench(TopKCase(f"top 5 of {entries}", 3, entries, 5)) for entries in (100, 16384))
    yield hyper_connection.bench_pre(HyperCase("m=5", 5, 1024), FP8_GROUP)
    yield hyper_connection.bench_post(HyperCase("m=5", 5, 512))
    yield from (router.bench(RouterCase(f"m={m}", m, 128, 512, 4)) for m in (5, 150))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench.sanitize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("op", nargs="?", metavar="OP", help="as rows name it, such as grouped_matmul")
    parser.add_argument("name", nargs="?", default="", metavar="CASE", help="how names of cases begin")
    parser.add_argument("tiling", nargs="?", metavar="TILING", help="what is in a tiling's name")
    args = parser.parse_args(argv)
    if jax.default_backend() != "gpu":
        print(f"no GPU here ({jax.devices()[0].device_kind}): nothing was run")
        return 0
    failed = launched = 0
    for case in cases():
        if args.op not in (None, case.op) or not case.name.startswith(args.name):
            continue
        sets = case.sets(1)[0]
        want = case.reference(sets)
        ways = [*case.ours.items()]
        few = ways[: MOST - 1] + ways[MOST - 1 :][-1:]
        for variant, run in few if args.tiling is None else [way for way in ways if args.tiling in way[0]]:
            launched += 1
            wrong = case.wrong(jax.jit(run)(sets), want)
            failed += wrong is not None
            print(f"{case.op} {case.name} {variant}: {wrong or 'right'}", flush=True)
    if not launched:
        known = ", ".join(dict.fromkeys(case.op for case in cases()))
        parser.error(f"nothing is called that: ops are {known}; without CASE and TILING, all of theirs run")
    print(f"{launched} kernels, {failed} of them wrong")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Checks, then times, every benchmark case: ours, XLA's best and the peer's, in one run with one method.

  python -m pallas_kernels.bench [OP ...] [--only TEXT] [--peers DIR] [--json FILE]   the figures
  python -m pallas_kernels.bench [OP ...] [--only TEXT] --tune --json FILE            every tiling of each case
  python -m pallas_kernels.bench --table FILE ...                                     keeps the best beside the op
  python -m pallas_kernels.bench --markdown FILE ...                                  a table for the README

Times are medians of kernel durations on the device (CUPTI), over input sets that overflow the L2 cache; "limit" is
bytes or FLOPs over the data sheet's rate (an H100's: 3.35 TB/s; an H200's: 4.8), whichever takes longer. Every result
of ours is compared with a float32 reference first. A row of FILE is written as soon as it is measured, and what FILE
has is not measured again, but for cases whose inputs or whose peer failed: the same command resumes a run that was
stopped. Without a GPU the cases are listed and nothing is timed.

Most of a run is compilation. With many cores, several parts of it at once, which take turns at the device:
  for i in $(seq 8); do python -m pallas_kernels.bench --part $i/8 --lock bench.lock --json rows$i.jsonl & done; wait
"""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax

from pallas_kernels.bench import peer_files, report, results
from pallas_kernels.bench.case import Bench
from pallas_kernels.bench.measure import DeviceLost, Row, beside, row_identity, rows, settled, was_beside

# Each is a module here with `benches() -> Iterable[Bench]`.
OPS = (
    "block_matmul",
    "grouped_matmul",
    "mxfp4",
    "quantize_rows",
    "weight_only",
    "one_scale",
    "batch_invariant",
    "sparse_attention",
    "sparse_attention_prefill",
    "index_scores",
    "top_k",
    "compress",
    "hyper_connection",
    "router",
)


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.ops) - set(OPS)):
        parser.error(f"no benchmark of {', '.join(unknown)}: there are {', '.join(OPS)}")
    others = not (args.tune or args.ours)
    try:
        if args.table or args.markdown:
            found = [row for path in args.table or args.markdown for row in results.read(_existing(path))]
            if args.markdown:
                print(report.markdown(found))
            for path in results.write_tables(found) if args.table else ():
                print(path)
            return 0
        if args.peers is not None:
            peer_files.require(args.peers)
        known = results.mend(args.json) if args.json else []
    except (OSError, ValueError) as error:
        parser.error(str(error))
    part, parts = args.part
    named = [case for op in args.ops or OPS for case in benches(op)]
    cases = [case for case in named if args.only in case.name]
    if not cases:
        parser.error(_nothing(args.only, args.ops or OPS, [case.name for case in named]))
    cases = cases[part - 1 :: parts]
    if jax.default_backend() != "gpu":
        for case in cases:
            print(f"{case.op}  {case.name}  limit {case.limit:.1f} us")
        print(f"{len(cases)} cases; no GPU here ({jax.devices()[0].device_kind}), so none was timed")
        return 0
    print(report.HEADER)
    keep = functools.partial(_keep, args.json)

    def stuck(row: Row) -> None:
        keep(row)
        print("the kernel never ends, and so this process does: the same command goes on behind it", flush=True)
        os._exit(1)

    wanted = set(beside(others, args.peers))
    finished = {row_identity(row) for row in known if settled(row) and wanted <= was_beside(row)}
    how = {"tuning": args.tune, "others": others, "peers": args.peers, "lock": args.lock}
    try:
        for case in cases:
            for row in rows(case, **how, finished=finished, stuck=stuck):
                keep(row)
    except DeviceLost:
        print("the device is lost to this process: the same command goes on behind the kernel that lost it")
        return 1
    return 0


def _keep(path: Path | None, row: Row) -> None:
    print(report.line(row), flush=True)
    if path is not None:
        results.append(path, row)


def _existing(path: Path) -> Path:
    """Raises ValueError where there is no such file: `results.read` takes it for one that has no rows yet."""
    if not path.is_file():
        there = sorted(file.name for file in path.parent.glob("*.jsonl"))
        held = f"{path.parent} has {', '.join(there)}" if there else f"{path.parent} has no *.jsonl"
        raise ValueError(f"no file {path}: results are what --json FILE wrote; {held}")
    return path


def _nothing(text: str, ops: Sequence[str], names: Sequence[str]) -> str:
    near = difflib.get_close_matches(text, names, n=3, cutoff=0.3) or names[:3]
    return (
        f"--only {text!r} is in the name of none of the {len(names)} cases of {', '.join(ops)}, which are called "
        f"{', '.join(map(repr, near))} and the like; without a GPU, or with JAX_PLATFORMS=cpu, "
        f"the command lists them all where --only is left out"
    )


def benches(op: str) -> Iterable[Bench]:
    return importlib.import_module(f"pallas_kernels.bench.{op}").benches()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; default: all")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has this in it")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="where the peers' kernels were unpacked")
    parser.add_argument("--json", type=Path, metavar="FILE", help="appends a JSON line a result; resumes")
    parser.add_argument("--ours", action="store_true", help="neither XLA nor the peer is timed")
    parser.add_argument("--tune", action="store_true", help="tries every tiling of ours, and neither XLA nor the peer")
    parser.add_argument("--part", type=_part, default=(1, 1), metavar="I/N", help="every N-th case from the I-th on")
    parser.add_argument("--lock", type=Path, metavar="FILE", help="takes turns with others that name the same file")
    made = parser.add_mutually_exclusive_group()
    made.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="makes tiling_h100.json of results")
    made.add_argument("--markdown", type=Path, nargs="+", metavar="FILE", help="prints results as a table")
    return parser


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 0 < int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part: 2/8 is the second of eight")
    return int(part), int(parts)


if __name__ == "__main__":
    sys.exit(main())

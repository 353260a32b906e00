"""Checks, then times, every benchmark case: ours, XLA's best and the peer's, in one run with one method.

    python -m pallas_kernels.bench [OP ...] [--only TEXT] [--peers DIR] [--json FILE] [--tune]

Without a GPU it lists the cases, says that it cannot time them, and exits 0. --tune tries every tiling of each case and
reports them all (otherwise the first that is listed); finished cases of FILE are not run again. Times are medians of
kernel durations on the device (CUPTI); "limit" is bytes over 3.35 TB/s or FLOPs over the data sheet's rate.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.bench import block_matmul
from pallas_kernels.bench.case import Bench, disagreement
from pallas_kernels.bench.timing import input_sets, microseconds

OPS: dict[str, Callable[[], Iterator[Bench]]] = {"block_matmul": block_matmul.benches}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; default: all")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has this in it")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="where the peers' kernels were unpacked")
    parser.add_argument("--json", type=Path, metavar="FILE", help="appends a JSON line a case")
    parser.add_argument("--tune", action="store_true", help="tries every tiling")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.ops) - OPS.keys()):
        parser.error(f"no benchmark of {', '.join(unknown)}: there are {', '.join(OPS)}")
    cases = [case for op in args.ops or OPS for case in OPS[op]() if args.only in case.name]
    if jax.default_backend() != "gpu":
        for case in cases:
            print(f"{case.op}  {case.name}  limit {case.limit:.1f} us")
        print(f"{len(cases)} cases; no GPU here ({jax.devices()[0].device_kind}), so none was timed")
        return 0
    done = _done(args.json)
    print(f"{'case':32} {'us':>8} {'limit':>6} {'TFLOP/s':>8} {'GB/s':>6} {'xla':>8} {'peer':>8} {'ratio':>6}  which")
    for case in cases:
        if (case.op, case.name) not in done:
            row = measure(case, args.peers, args.tune)
            _print(row)
            if args.json is not None:
                with args.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    return 0


def measure(case: Bench, peers: Path | None, tune: bool) -> dict[str, Any]:
    """One row: every figure of a case. An implementation that fails or is wrong has its reason in place of a time."""
    keys = jax.random.split(jax.random.key(0), input_sets(case.nbytes))
    make = jax.jit(case.inputs)
    sets = [make(key) for key in keys]
    want = case.reference(sets[0])
    tried = list(case.ours.items()) if tune else list(case.ours.items())[:1]
    ours = {name: _timed(run, sets, want) for name, run in tried}
    xla = {name: _timed(run, sets, None) for name, run in case.xla.items()}
    del sets
    peer: float | str | None = None
    if peers is not None and case.peer is not None:
        from pallas_kernels.bench.peers import time_peer

        try:
            peer = time_peer(peers, case.peer, case.nbytes)
        except Exception as error:
            peer = f"{type(error).__name__}: {error}"[:300]
    good = {name: time for name, time in ours.items() if isinstance(time, float)}
    best = min(good, key=good.__getitem__, default=None)
    device = jax.devices()[0]
    return {
        "op": case.op,
        "case": case.name,
        **case.shape,
        "best": best,
        "us": good.get(best) if best else None,
        "limit_us": case.limit,
        "nbytes": case.nbytes,
        "flops": case.flops,
        "ours": ours,
        "xla": xla,
        "peer_us": peer,
        "device": device.device_kind,
        "jax": jax.__version__,
    }


def _timed(run: Callable[[Any], Any], sets: list[Any], want: Any) -> float | str:
    try:
        if want is not None:
            got = run(sets[0])
            if reason := disagreement(got[: want.shape[0]], want):
                return f"wrong: {reason}"
        return microseconds(run, sets)
    except Exception as error:  # a tiling that does not fit must not end the run
        return f"{type(error).__name__}: {error}"[:300]


def _print(row: dict[str, Any]) -> None:
    def text(value: Any, form: str) -> str:
        return format(value, form) if isinstance(value, float) else "-"

    us, peer = row["us"], row["peer_us"]
    xla = min((time for time in row["xla"].values() if isinstance(time, float)), default=None)
    rate, bandwidth = (row["flops"] / us / 1e6, row["nbytes"] / us / 1e3) if us else (None, None)
    ratio = peer / us if us and isinstance(peer, float) else None
    print(
        f"{row['case']:32} {text(us, '8.1f'):>8} {row['limit_us']:6.1f} {text(rate, '8.0f'):>8} "
        f"{text(bandwidth, '6.0f'):>6} {text(xla, '8.1f'):>8} {text(peer, '8.1f'):>8} {text(ratio, '6.2f'):>6}  "
        f"{row['best'] or next(iter(row['ours'].values()), 'no kernel takes it')}",
        flush=True,
    )


def _done(path: Path | None) -> set[tuple[str, str]]:
    if path is None or not path.exists():
        return set()
    return {(row["op"], row["case"]) for row in map(json.loads, path.read_text().splitlines())}


if __name__ == "__main__":
    sys.exit(main())

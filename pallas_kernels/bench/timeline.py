"""Where the time of a kernel goes: when each of its warpgroups enters and leaves its phases, in one launch.

  python -m pallas_kernels.bench.timeline OP --only TEXT --to DIR

Runs the first benchmark case of OP whose name has TEXT in it on two sets of inputs, and prints a table for the second:
warpgroups with the same phases together, medians over them, in cycles of a multiprocessor (about 1.7 a nanosecond). The
traces in DIR open in Perfetto or chrome://tracing. Phases are what kernels put under `jax.named_scope`. To note one
takes some 12 cycles, and may keep instructions from moving past it: how long a launch takes, the benchmark says.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pallas_kernels.bench.__main__ import OPS, benches
from pallas_kernels.bench.case import Bench
from pallas_kernels.mosaic.launch import PHASES, timeline


class Phase(NamedTuple):
    """Of one kind of warpgroup: how often it is in a phase, and for how many cycles altogether; medians."""

    name: str
    times: float
    cycles: float


class Role(NamedTuple):
    """Warpgroups that go through the same phases: how many, and cycles from the first phase to the end of the last."""

    warpgroups: int
    cycles: float
    phases: tuple[Phase, ...]


def roles(trace: dict[str, Any]) -> list[Role]:
    """What warpgroups do, of a file of Chrome trace events; those with most phases first."""
    events = defaultdict(list)
    for event in trace["traceEvents"]:
        events[event["tid"]].append(event)
    alike = defaultdict(list)
    for mine in events.values():
        alike[frozenset(event["name"] for event in mine)].append(mine)
    found = [_role(group) for group in alike.values()]
    return sorted(found, key=lambda role: -sum(phase.times for phase in role.phases))


def _role(warpgroups: list[list[dict[str, Any]]]) -> Role:
    names = dict.fromkeys(event["name"] for event in warpgroups[0])  # in the order of their first time
    times, cycles, spans = defaultdict(list), defaultdict(list), []
    for events in warpgroups:
        lengths, entered = defaultdict(list), []
        for event in events:
            if event["ph"] == "B":
                entered.append(event)
            else:
                begin = entered.pop()
                lengths[begin["name"]].append(1e3 * (event["ts"] - begin["ts"]))
        spans.append(1e3 * (events[-1]["ts"] - events[0]["ts"]))
        for name in names:
            times[name].append(len(lengths[name]))
            cycles[name].append(sum(lengths[name]))
    phases = (Phase(name, statistics.median(times[name]), statistics.median(cycles[name])) for name in names)
    return Role(len(warpgroups), statistics.median(spans), tuple(phases))


def table(role: Role) -> str:
    lines = [f"{role.warpgroups} warpgroups, {role.cycles:.0f} cycles", f"{'phase':<28} times  cycles   each  share"]
    for name, times, cycles in role.phases:
        each = cycles / max(times, 1)
        lines.append(f"{name:<28} {times:5.0f} {cycles:7.0f} {each:6.0f} {cycles / max(role.cycles, 1):5.0%}")
    return "\n".join(lines)


def run(case: Bench, which: str, directory: Path, phases: int) -> list[Path]:
    """Runs an implementation of a case on two sets of inputs; returns the traces of the second, one a launch."""
    before = set(directory.iterdir())
    made: list[Path] = []
    with timeline(directory, phases):
        call = jax.jit(case.ours[which])
        for inputs in case.sets(2):
            for path in made:  # all launches of a kernel write to the same file, and none replaces it
                path.unlink()
            jax.block_until_ready(call(inputs))
            jax.effects_barrier()
            made = sorted(set(directory.iterdir()) - before)
    return made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench.timeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("op", metavar="OP", choices=OPS, help=f"one of {', '.join(OPS)}")
    parser.add_argument("--only", default="", metavar="TEXT", help="the first case whose name has this in it")
    parser.add_argument("--which", metavar="NAME", help="implementation or tiling; left out, the one that is timed")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="where traces are left")
    parser.add_argument("--phases", type=int, default=PHASES, help=f"kept of a warpgroup, {PHASES} if left out")
    args = parser.parse_args(argv)
    case = next((case for case in benches(args.op) if args.only in case.name), None)
    if case is None:
        parser.error(f"no case of {args.op} has {args.only!r} in its name: python -m pallas_kernels.bench lists them")
    which = args.which or case.usual
    if which not in case.ours:
        parser.error(f"{case.name} has no {which!r}: there are {', '.join(case.ours)}")
    if jax.default_backend() != "gpu":
        print(f"no GPU here ({jax.devices()[0].device_kind}): {case.name} was not run")
        return 0
    args.to.mkdir(parents=True, exist_ok=True)
    print(f"{case.name}, {which}")
    traces = run(case, which, args.to, args.phases)
    if not traces:
        print("its kernels write no timelines: theirs are launched without mosaic.launch.compiler_params")
    for path in traces:
        found = roles(json.loads(path.read_text()))
        print(f"\n{path}" if found else f"\n{path}: this kernel names no phases")
        for role in found:
            print(table(role))
    return 0


if __name__ == "__main__":
    sys.exit(main())

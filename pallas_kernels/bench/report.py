"""Rows of results for people: a line each while they are measured, a Markdown table for the README."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pallas_kernels.bench.measure import peer_failure

Row = dict[str, Any]
HEADER = f"{'case':32} {'us':>8} {'limit':>7} {'TFLOP/s':>8} {'GB/s':>6} {'xla':>8} {'peer':>8} {'ratio':>6}  which"


def line(row: Row) -> str:
    """One row; why there is no time, of ours or of the peer, is at its end."""
    failed = f"peer failed: {peer_failure(row)}" if peer_failure(row) else ""
    reasons = "; ".join(filter(None, (row["reason"], failed)))
    return (
        f"{row['case']:32} {_number(row['us'], 1):>8} {row['limit_us']:7.1f} {_number(row['tflops'], 0):>8} "
        f"{_number(row['gbps'], 0):>6} {_number(row['xla_us'], 1):>8} {_peer(row):>8} "
        f"{_number(row['ratio'], 2):>6}  {row['which'] or ''} {reasons}".rstrip()
    )


def markdown(rows: Iterable[Row]) -> str:
    """A table with the last row of each case, or, where a case was only tuned, its fastest; below it what failed.

    The rate is TFLOP/s where arithmetic bounds the case and GB/s where memory does; the ratio is the peer's time over
    ours.
    """
    chosen: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row["op"], row["case"]
        if key not in chosen or _better(row, chosen[key]):
            chosen[key] = row
    lines = [
        "| case | us | rate | of the limit | XLA, us | peer, us | peer / ours |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (op, case), row in chosen.items():
        unit, rate = ("TFLOP/s", row["tflops"]) if row["bound"] == "flops" else ("GB/s", row["gbps"])
        cells = [
            f"{op}: {case}",
            _number(row["us"], 1),
            f"{rate:.0f} {unit}" if rate else "-",
            f"{100 * row['share']:.0f} %" if row["share"] else "-",
            _number(row["xla_us"], 1),
            _peer(row),
            _number(row["ratio"], 2),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    failures = []
    for (op, case), row in chosen.items():
        who = {"ours": row["reason"], "the peer": peer_failure(row)}
        failures += [f"- {op}: {case}: {name} failed: {reason}" for name, reason in who.items() if reason]
    return "\n".join([*lines, *(["", *failures] if failures else [])])


def _peer(row: Row) -> str:
    return "failed" if peer_failure(row) else _number(row["peer_us"], 1)


def _better(row: Row, than: Row) -> bool:
    if not row["tuning"]:
        return True
    return than["tuning"] and row["us"] is not None and (than["us"] is None or row["us"] < than["us"])


def _number(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, float | int) else "-"

"""How `dsv4 evaluate` prints its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dsv4.cli import output

if TYPE_CHECKING:
    from dsv4.evaluate.bootstrap import Estimate
    from dsv4.evaluate.rows import Row


def print_rows(rows: Sequence[Row], facts: dict[str, Any]) -> None:
    """Two tables: what each recipe does to predictions, then to continuations and sizes."""
    base = rows[0]
    title = (
        f"{facts['tokens']:,} tokens, {facts['text_bytes']:,} bytes of {facts['text']} in {facts['windows']} windows"
    )
    predictions = [
        (
            row.recipe,
            interval(row.bits_per_byte, "{:.4f}"),
            interval(row.bits_ratio, "{:+.2f} %", lambda x: 100 * (x - 1)),
            interval(row.kl, "{:.5f}"),
            interval(row.top1, "{:.1f} %", _percent),
            interval(row.index_overlap, "{:.1f} %", _percent),
        )
        for row in rows
    ]
    headers = ("recipe", "bits per byte", "more than bf16", "KL, nats a token", "top-1 equal", "index top-k equal")
    output.table(predictions, headers, title=f"{title}, 95 % intervals")
    print()
    continuations = [
        (
            row.recipe,
            interval(row.greedy_equal, "{:.0f} %", _percent),
            interval(row.divergence_mean, "{:.0f}"),
            interval(row.divergence_median, "{:.0f}"),
            output.size(row.weight_bytes),
            _share(row.weight_bytes, base.weight_bytes),
            f"{row.cache_bytes:,.1f} B",
            _share(row.cache_bytes, base.cache_bytes),
        )
        for row in rows
    ]
    headers = ("recipe", "greedy equal", "first differs, mean", "median", "weights", "share", "cache, a token", "share")
    title = f"{facts['prompts']} prompts of {facts['prompt_tokens']} tokens, {facts['new_tokens']} new ones, greedy"
    output.table(continuations, headers, title=title if facts["prompts"] else "")


def interval(estimate: Estimate | None, form: str, scale: Callable[[float], float] = float) -> str:
    """`value [low, high]`, the value alone where the ends say no more, `-` where nothing was measured."""
    if estimate is None or math.isnan(estimate.value):
        return "-"
    value, *ends = (form.format(scale(x)) for x in (estimate.value, estimate.low, estimate.high))
    if math.isnan(estimate.low) or estimate.low == estimate.high:
        return value
    low, high = (end.removesuffix(" %") for end in ends)
    return f"{value} [{low}, {high}]"


def _percent(share: float) -> float:
    return 100 * share


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.3f}" if whole else "-"

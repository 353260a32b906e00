"""The figure of an evaluation: what each recipe adds in bits and saves in bytes. Needs the `plots` extra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsv4.evaluate.rows import Row

MARKERS = "os^Dv<>pP*X"


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Increase in bits per byte over the baseline, in per cent with its interval, against bytes of weights, as PNG."""
    from matplotlib.figure import Figure  # without pyplot: neither a display nor global state

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(rows):
        if row.bits_ratio is None:
            continue
        value, low, high = (100 * (x - 1) for x in (row.bits_ratio.value, row.bits_ratio.low, row.bits_ratio.high))
        errors = [[value - low], [high - value]]
        marker = MARKERS[number % len(MARKERS)]
        axes.errorbar(
            row.weight_bytes / 1e6, value, errors, fmt=marker, capsize=4, label=f"{row.recipe}: {value:+.2f} %"
        )
    axes.axhline(0, color="grey", linewidth=1)
    axes.set(xlabel="weights, MB", ylabel="more bits per byte than bf16, %", title=title)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, format="png", dpi=120)

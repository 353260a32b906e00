"""Tables and the figure of `outliers.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dsv4.cli.output import table

PLOTTED = 4  # planted channels that are shown; the files have more
COLOURS = {"tensor": "tab:red", "channel": "tab:orange", "block": "tab:blue"}
LINES = {"plain": "-", "isolated": ":", "rotated": "--"}


def print_planted(rows: list[dict[str, Any]]) -> None:
    shown = [row for row in rows if row["channels"] == PLOTTED and row["factor"] in (10, 100, 1000)]
    for what in ("error", "ordinary", "crushed"):
        clean = next(row for row in rows if row["channels"] == 0)
        body = [[name, *(f"{100 * row[what][name]:.1f} %" for row in (clean, *shown))] for name in clean[what]]
        table(
            body,
            ("scheme", "none", *(f"x{row['factor']}" for row in shown)),
            title=f"{what}, {PLOTTED} channels planted",
        )
        print()


def print_trained(rows: list[dict[str, Any]]) -> None:
    kinds = sorted({kind_of(row) for row in rows})
    body = []
    for kind in kinds:
        group = [row for row in rows if kind_of(row) == kind]
        strengths = (("max_over_rms", "{:.0f}"), ("channel_over_median", "{:.1f}"), ("weight_max_over_rms", "{:.1f}"))
        cells = [f"{form.format(max(row[name] for row in group))}" for name, form in strengths]
        body.append([kind, str(len(group)), *cells])
    title = "trained: largest over the layers of a kind"
    table(body, ("input of", "layers", "max/rms", "channel/median channel", "weight max/rms"), title=title)
    print()
    body = []
    for scheme in rows[0]["error"]:
        values = np.array([row["error"][scheme] for row in rows])
        body.append([scheme, *(f"{100 * x:.2f} %" for x in (np.median(values), values.max()))])
    table(body, ("scheme", "median error", "worst layer"), title=f"trained: error of {len(rows)} layers' outputs")


def kind_of(row: dict[str, Any]) -> str:
    return ".".join(row["name"].split(".")[3:-1])


def draw(planted: list[dict[str, Any]], trained: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(15, 5), layout="constrained")
    *panels, right = figure.subplots(1, 3)
    rows = sorted((row for row in planted if row["channels"] == PLOTTED), key=lambda row: row["factor"])
    for what, axes in zip(("ordinary", "crushed"), panels, strict=True):
        for scheme in rows[0][what]:
            values = [row[what][scheme] for row in rows]
            axes.loglog(
                [row["factor"] for row in rows], values, markersize=4, linewidth=1, label=scheme, **look(scheme)
            )
        axes.set(xlabel=f"factor of {PLOTTED} of 1024 channels", ylabel=f"error, {what}", title=f"planted: {what}")
        axes.legend(fontsize=7, ncols=2)
    schemes = list(trained[0]["error"])
    right.boxplot([[row["error"][scheme] for row in trained] for scheme in schemes], whis=(0, 100))
    right.set_xticks(range(1, len(schemes) + 1), schemes, rotation=60, ha="right", fontsize=7)
    right.set(yscale="log", ylabel="error of a layer's output", title="the shipped model's own layers")
    figure.savefig(path, dpi=120)
    print(path)


def look(scheme: str) -> dict[str, Any]:
    element, scaling, treatment = scheme.split()
    return {"color": COLOURS[scaling], "linestyle": LINES[treatment], "marker": "o" if element == "fp8" else "s"}

"""Held-out bits per byte over training, one line a run.

    python experiments/plot_training.py experiments/results/small/*.jsonl --out experiments/results/small/curve.png

A second of work; needs the `plots` extra. The dashed line is `xz -9` on the same split (experiments/xz_baseline.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dsv4.training.metrics import read_metrics

XZ_BITS_PER_BYTE = 1.9349


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="metrics files")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for path in options.runs:
        rows = [row for row in read_metrics(path) if "bits_per_byte" in row]
        steps, bits = [row["step"] for row in rows], [row["bits_per_byte"] for row in rows]
        axes.plot(steps, bits, marker="o", markersize=3, label=f"{path.stem}: {bits[-1]:.3f}")
    axes.axhline(XZ_BITS_PER_BYTE, color="grey", linestyle="--", linewidth=1, label=f"xz -9: {XZ_BITS_PER_BYTE:.3f}")
    axes.set(xlabel="steps of 32,768 tokens", ylabel="held-out bits per byte", title="shipped model and dense control")
    axes.legend(fontsize=8)
    figure.savefig(options.out, dpi=120)
    print(options.out)


if __name__ == "__main__":
    main()

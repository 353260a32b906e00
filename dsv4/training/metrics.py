"""Run records: one JSON object a line, and the config beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Metrics:
    """Appends rows to `<folder>/metrics.jsonl`; a run resumed after `done` steps first drops later rows."""

    def __init__(self, folder: Path, done: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= done]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        partial.replace(self.path)

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a metrics file; none where there is no file, and a torn last line is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows

"""Files of results, one JSON object a line, and the tables of best tilings that are made of them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pallas_kernels
from pallas_kernels.block_matmul import table as tables
from pallas_kernels.block_matmul.problem import Problem
from pallas_kernels.block_matmul.table import Entry, Table, TableError
from pallas_kernels.grouped_matmul import tilings as grouped_tilings

Row = dict[str, Any]
TABLE = "tiling_h100.json"
TABLE_DEVICES = "H100", "H200"  # one chip, but for its memory
# op -> kinds of tilings in its table.
KINDS: dict[str, dict[str, type]] = {"block_matmul": tables.KINDS, "grouped_matmul": grouped_tilings.KINDS}


def read(path: Path) -> list[Row]:
    """The rows of a file, none where it does not exist. A last line that was cut off is no row.

    Raises ValueError naming file and line for any other line that is not one.
    """
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not {"op", "case", "which", "tuning", "device"} <= row.keys():
                raise ValueError("not a row of results")
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(f"{path}, line {number}: {error}") from None
        rows.append(row)
    return rows


def mend(path: Path) -> list[Row]:
    """The rows of a file that is going to be appended to, whose last line is made whole or dropped."""
    rows = read(path)
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        write(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def append(path: Path, row: Row) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def write(path: Path, text: str) -> None:
    """Replaces a file as a whole: who reads it sees the old one or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(name, path.stat().st_mode & 0o777 if path.exists() else 0o644)  # mkstemp's is for the owner alone
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_tables(rows: Iterable[Row], root: Path | None = None) -> list[Path]:
    """Writes the fastest tiling of every problem into the table beside its op, over what was there; returns the files.

    Problems without a new row stay. root: of the ops' folders. Raises TableError for rows of another device, or of two:
    the fastest would say which device is, not which tiling.
    """
    root = Path(pallas_kernels.__file__).parent if root is None else root
    of_op: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("kind") and row["us"] is not None:
            if not any(name in row["device"] for name in TABLE_DEVICES):
                raise TableError(f"{row['op']} {row['case']} was measured on {row['device']}: {TABLE} is of Hopper")
            of_op.setdefault(row["op"], []).append(row)
    devices = sorted({row["device"] for found in of_op.values() for row in found})
    if len(devices) > 1:
        raise TableError(f"rows were measured on {' and on '.join(devices)}: one device at a time")
    paths = []
    for op, found in of_op.items():
        path = root / op / TABLE
        old = tables.parse(path.read_text(), str(path), KINDS[op]) if path.exists() else {}
        write(path, table_text(merged(old, found, KINDS[op])))
        paths.append(path)
    tables.load.cache_clear()
    return paths


def merged(old: Table, rows: Iterable[Row], kinds: dict[str, type]) -> Table:
    """A table with the fastest of `rows` for every problem they have, and the old entries of all others."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row["kind"], row["problem"]
        if key not in best or row["us"] < best[key]["us"]:
            best[key] = row
    entries = {(kind, str(entry.problem)): entry for kind, found in old.items() for entry in found}
    for (kind, problem), row in best.items():
        tiling = tables.tiling_of(kinds[kind], row["tiling"], f"{row['op']} {row['case']}")
        on = next((name for name in TABLE_DEVICES if name in row["device"]), row["device"])
        entries[kind, problem] = Entry(Problem.parse(problem), tiling, round(row["us"], 2), on)
    return {kind: tuple(entry for (of, _), entry in entries.items() if of == kind) for kind in kinds}


def table_text(table: Table) -> str:
    """The JSON of a table, one problem a line, in order of size: a new measurement is a short diff."""
    kinds = []
    for kind, entries in table.items():
        ordered = sorted(entries, key=lambda entry: tuple(vars(entry.problem).values()))
        lines = (f"    {json.dumps(str(e.problem))}: {json.dumps(vars(e.tiling) | _measured(e))}" for e in ordered)
        if ordered:
            kinds.append(f"  {json.dumps(kind)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(kinds) + "\n}\n" if kinds else "{}\n"


def _measured(entry: Entry) -> Row:
    return {"us": entry.us} | ({"on": entry.on} if entry.on else {})

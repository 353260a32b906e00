"""What commands print and write: tables on stdout, progress on stderr, files whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO


def table(
    rows: Sequence[Sequence[str]], headers: Sequence[str], *, title: str = "", file: TextIO | None = None
) -> None:
    """A table on `file` (default: stdout): drawn for a terminal, plain aligned columns for anything else."""
    target = sys.stdout if file is None else file
    if target.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        drawn = Table(title=title or None, title_justify="left", show_header=any(headers))
        for header in headers:
            drawn.add_column(header, overflow="fold")
        for row in rows:
            drawn.add_row(*(Text(cell) for cell in row))
        Console(file=target).print(drawn)
        return
    if title:
        print(title, file=target)
    lines = [list(headers), *map(list, rows)] if any(headers) else list(map(list, rows))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(padded).rstrip(), file=target)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside `path` to write to, renamed to `path` when the block succeeds and removed when it does not.

    It is created at once: a place that cannot be written is an OSError before anything is computed.
    """
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a directory, name a file in it")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror} (does its directory exist?)") from error
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def json_file(path: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that takes the results of a command and writes them to `path` (None: nowhere), as `replacing` does."""
    if path is None:
        yield lambda results: None
        return
    with replacing(path) as temporary:

        def write(results: dict[str, Any]) -> None:
            temporary.write_text(json.dumps(results, indent=2) + "\n")

        yield write


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, moved by calling `(done, total)`; without a terminal, one line at the end."""
    begin = time.perf_counter()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        yield lambda done, total: None
    print(f"{what}: {time.perf_counter() - begin:.1f} s", file=sys.stderr)


def count(value: float) -> str:
    """1_573_000_000_000 -> "1.57 T", three digits of a number with its unit."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def size(value: float) -> str:
    """159_609_485_896 -> "160 GB", decimal units; small numbers exactly."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:,.0f} B"

"""The `dsv4` command: one file a command, one grammar for all of them."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: the process's own) and returns its exit code: 0, 1 failed, 2 bad arguments."""
    from dsv4.cli.app import run

    return run(argv)

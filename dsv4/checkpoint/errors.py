"""One error for everything that is wrong with a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SHOWN = 10  # problems of one kind spelled out in a message


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written.

    subject: what was attempted, with the path. problems: kind of problem -> its instances, all of them; the
    message shows the first few of each kind and counts the rest.
    """

    def __init__(self, subject: str, problems: Mapping[str, Sequence[str]] | None = None) -> None:
        self.problems = {kind: list(found) for kind, found in (problems or {}).items() if found}
        super().__init__("\n".join([subject, *map(_section, self.problems.items())]))


def _section(problem: tuple[str, list[str]]) -> str:
    kind, found = problem
    lines = [f"  {kind} ({len(found)}):", *(f"    {text}" for text in found[:SHOWN])]
    if len(found) > SHOWN:
        lines.append(f"    ... and {len(found) - SHOWN} more")
    return "\n".join(lines)

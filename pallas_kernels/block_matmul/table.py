"""Tables of measured tilings: JSON files beside the ops, read and checked.

`{kind: {problem: {**tiling, "us": measured, "on": device}}}`. A problem is written as its sizes are: `m=3072 n=4096
k=4096 experts=256 rows=16`. `on` says which GPU measured the entry: H100 and H200 are one chip but for the memory, so
that both may use it. Their times differ as their memory does: where two kernels have an entry for one problem, the
faster one is chosen, so that both should be of one GPU (three pairs are not; one of each is more than twice as fast).
`python -m pallas_kernels.bench --tune`, then `--table`, make them.
"""

from __future__ import annotations

import functools
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pallas_kernels.block_matmul.problem import Problem
from pallas_kernels.block_matmul.tiling import FewRows, ManyRows
from pallas_kernels.block_matmul.weight_only_tiling import WeightOnly

TABLE = Path(__file__).with_name("tiling_h100.json")
DENSE: dict[str, type] = {"few_rows": FewRows, "many_rows": ManyRows}  # of FP8 products
KINDS = DENSE | {"weight_only": WeightOnly}


class TableError(ValueError):
    """A table of tilings that cannot be read; names the file and the key."""


class Entry(NamedTuple):
    """A measured tiling, with its microseconds and the device that took them ("" where nobody noted it)."""

    problem: Problem
    tiling: Any
    us: float
    on: str = ""


Table = Mapping[str, tuple[Entry, ...]]


@functools.cache
def load(path: Path, kinds: tuple[tuple[str, type], ...] = tuple(KINDS.items())) -> Table:
    """The table at `path`, empty where there is no file. kinds: name -> class of its tilings. Raises TableError."""
    return parse(path.read_text(), str(path), dict(kinds)) if path.exists() else {}


def parse(text: str, where: str, kinds: Mapping[str, type] = KINDS) -> Table:
    """The table that `text` holds; `where` is for errors. Raises TableError."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise TableError(f"{where}: {error}") from None
    if not isinstance(content, dict):
        raise TableError(f"{where}: not a table of {', '.join(kinds)}")
    if unknown := content.keys() - kinds.keys():
        raise TableError(f"{where}: {', '.join(sorted(unknown))}: there are {', '.join(kinds)}")
    table = {}
    for kind, problems in content.items():
        if not isinstance(problems, dict):
            raise TableError(f"{where}: {kind}: not a table of problems")
        table[kind] = tuple(
            _entry(kinds[kind], key, value, f"{where}: {kind}: {key!r}") for key, value in problems.items()
        )
    return table


def _entry(cls: type, key: str, value: Any, where: str) -> Entry:
    try:
        problem = Problem.parse(key)
    except ValueError as error:
        raise TableError(f"{where}: not a problem: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("us"), int | float):
        raise TableError(f"{where}: no tiling with its `us`")
    if not isinstance(on := value.get("on", ""), str):
        raise TableError(f"{where}: on is {on!r}: the name of a device")
    tiling = {name: setting for name, setting in value.items() if name not in ("us", "on")}
    return Entry(problem, tiling_of(cls, tiling, where), float(value["us"]), on)


def tiling_of(cls: type, settings: Mapping[str, Any], where: str) -> Any:
    """A tiling of `cls` with these settings, checked against the types of its fields. Raises TableError."""
    types = typing.get_type_hints(cls)
    for name, setting in settings.items():
        kind = types.get(name)
        if kind is None:
            raise TableError(f"{where}: {cls.__name__} has no {name}, but {', '.join(types)}")
        if typing.get_origin(kind) is typing.Literal:
            good = setting in typing.get_args(kind)
        else:
            good = type(setting) is kind and (kind is not int or setting > 0)
        if not good:
            raise TableError(f"{where}: {name} is {setting!r}")
    try:
        return cls(**settings)
    except ValueError as error:
        raise TableError(f"{where}: {error}") from None

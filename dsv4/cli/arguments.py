"""The arguments that several commands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from dsv4.config import names


def _override(words: list[str]) -> str:
    path, equals, _ = words[0].partition("=")
    if not equals or not path.strip():
        raise ValueError(f"{words[0]!r} is not of the form FIELD=VALUE, e.g. model.moe.experts=8")
    return words[0]


_OVERRIDE = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="FIELD=VALUE",
    instance_from_str=_override,
    is_instance=lambda value: isinstance(value, str),
    str_from_instance=lambda value: [value],
)

Config = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="CONFIG",
        help=f"A named config ({', '.join(names())}), a Python file that defines MODEL, a config.json, or a "
        "checkpoint directory.",
    ),
]
Overrides = Annotated[
    tyro.conf.UseAppendAction[tuple[Annotated[str, _OVERRIDE], ...]],
    tyro.conf.arg(
        help="Changes one field of the config: model.width=512, model.moe.experts=8, train.steps=200, "
        "model.layers=window,csa:4,hca:128*3."
    ),
]
JsonFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help="Also writes the results as JSON to this file.")]
Checkpoint = Annotated[
    str,
    tyro.conf.arg(
        metavar="CHECKPOINT",
        help="A checkpoint directory, released or orbax, or the name of a shipped model.",
    ),
]

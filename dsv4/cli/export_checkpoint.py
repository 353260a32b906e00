"""`dsv4 export`: orbax to the released layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from dsv4.cli import output
from dsv4.cli.arguments import JsonFile
from dsv4.cli.convert import Directory, report
from dsv4.cli.source import load_model


@dataclass(frozen=True)
class Export:
    """Reads an orbax checkpoint and writes it in the released layout, which other implementations load.

    A model that layout cannot express (a research setting) is refused, naming what stands in the way. DST must not
    exist, or be empty.

    examples:
      dsv4 export runs/tiny/model tiny-released
    """

    source: Annotated[Directory, tyro.conf.arg(metavar="SRC", help="An orbax checkpoint.")]
    destination: Annotated[Directory, tyro.conf.arg(metavar="DST", help="The released checkpoint to make.")]
    json: JsonFile = None

    def run(self) -> None:
        from dsv4 import checkpoint

        with output.json_file(self.json) as write:
            model = load_model(str(self.source))
            with output.progress(f"writing {self.destination}"):
                checkpoint.export(model, self.destination)
            report(model, self.source, self.destination, write)

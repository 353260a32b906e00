"""`dsv4 import`: released layout to orbax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from dsv4.cli import output
from dsv4.cli.arguments import JsonFile
from dsv4.cli.convert import Directory, report
from dsv4.cli.source import load_model


@dataclass(frozen=True)
class Import:
    """Reads a released checkpoint (config.json and safetensors) and saves it as an orbax checkpoint.

    Weights keep their formats, bit for bit; a tokenizer.json goes with them. DST must not exist, or be empty.

    examples:
      dsv4 import DeepSeek-V4-Flash flash-orbax
    """

    source: Annotated[Directory, tyro.conf.arg(metavar="SRC", help="A released checkpoint.")]
    destination: Annotated[Directory, tyro.conf.arg(metavar="DST", help="The orbax checkpoint to make.")]
    json: JsonFile = None

    def run(self) -> None:
        from dsv4 import checkpoint

        if checkpoint.is_orbax(self.source):
            raise checkpoint.CheckpointError(f"{self.source} is an orbax checkpoint: dsv4 export reads those")
        with output.json_file(self.json) as write:
            model = load_model(str(self.source))
            with output.progress(f"writing {self.destination}"):
                checkpoint.save(model, self.destination)
            report(model, self.source, self.destination, write)

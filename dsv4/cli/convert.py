"""What `dsv4 import` and `dsv4 export` share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from dsv4.cli import output
from dsv4.cost import count_parameters

if TYPE_CHECKING:
    from dsv4.model.handle import Model

Directory = tyro.conf.Positional[Path]


def report(model: Model, source: Path, destination: Path, write: Callable[[dict[str, Any]], None]) -> None:
    """Says what was converted, on stdout and through `write`."""
    import jax

    parameters = count_parameters(model.config)
    facts = {
        "source": str(source),
        "destination": str(destination),
        "parameters": parameters.total + parameters.mtp,
        "arrays": len(jax.tree.leaves(model.params)),
        "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
    }
    write(facts)
    amount = f"{output.count(facts['parameters'])} parameters, {output.size(facts['bytes'])}"
    print(f"{destination}: {amount} in {facts['arrays']} arrays")

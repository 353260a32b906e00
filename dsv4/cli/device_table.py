"""Device x op -> implementation and why: every candidate is asked about calls that were traced once.

What an implementation refuses follows from shapes, dtypes and the device, so no device is needed and nothing is run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax

from dsv4.cli.implementations import traced_calls
from dsv4.config import ModelConfig
from dsv4.config.execution import Float
from dsv4.config.recipe import Recipe
from pallas_kernels.block_matmul.sm90 import NO_HOPPER
from pallas_kernels.device import KINDS, pretend
from pallas_kernels.dispatch import Call
from pallas_kernels.formats import QuantFormat, format_name
from pallas_kernels.quant import QuantTensor, Rows

PLAIN = "plain"  # operands that no recipe has rounded


@dataclass(frozen=True)
class Cell:
    """What calls of one op run on one device, and `name: reason` of what they do not."""

    runs: tuple[str, ...]
    refused: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """Calls of one op with operands of one kind. operands: formats of weights and activations, or PLAIN.

    choice: whether the op has more than its reference. rows: what quantised rows an op that writes them is given,
    "entries" or "index keys", whose answers may differ; "" for every other op.
    """

    op: str
    operands: str
    choice: bool
    cells: dict[str, Cell]
    rows: str = ""


def device_table(config: ModelConfig, recipe: Recipe | None) -> list[Row]:
    """A row for every op and kind of operands, a cell for every device of KINDS; `recipe` as in `traced_calls`.

    A model runs in the dtype that a device multiplies in: it is traced once in each.
    """
    dtypes: tuple[Float, ...] = "float32", "bfloat16"
    calls = {dtype: traced_calls(config, recipe, dtype) for dtype in dtypes}
    groups: dict[tuple[str, str, str], dict[str, list[Call]]] = {}
    for dtype, of_phases in calls.items():
        for phase_calls in of_phases.values():
            for call in phase_calls:
                kind = call.op.name, _operands(call), _written_rows(call)
                groups.setdefault(kind, {}).setdefault(dtype, []).append(call)
    return [
        Row(
            op,
            operands,
            any(len(call.op.candidates) > 1 for group in by_dtype.values() for call in group),
            {name: _cell(name, by_dtype.get(kind.matmul_dtype, [])) for name, kind in KINDS.items()},
            rows,
        )
        for (op, operands, rows), by_dtype in sorted(groups.items())
    ]


def recipe_table(config: ModelConfig, recipe: Recipe) -> list[Row]:
    """The rows of one layer of `config` under `recipe`: the one with the most ops."""
    fullest = max(config.layers, key=lambda layer: ("window", "full", "hca", "csa").index(layer.kind))
    one = dataclasses.replace(config, layers=(fullest,), moe=dataclasses.replace(config.moe, hash_layers=0))
    return device_table(one, recipe)


def _cell(device: str, calls: Iterable[Call]) -> Cell:
    with pretend(KINDS[device]):
        answers = [call.op.choose(call.args, call.kwargs) for call in calls]
    runs = dict.fromkeys(candidate.name for candidate, _ in answers)
    return Cell(tuple(runs), tuple(dict.fromkeys(refusal for _, refusals in answers for refusal in refusals)))


def _operands(call: Call) -> str:
    stored = (QuantTensor, Rows)
    parts = jax.tree.leaves(call.args, is_leaf=lambda part: isinstance(part, stored))
    forms = [part.format for part in parts if isinstance(part, QuantTensor)]
    forms += [part.format.quant for part in parts if isinstance(part, Rows) and part.format.quant is not None]
    weights = dict.fromkeys(format_name(form) for form in forms)
    activations: QuantFormat | None = call.kwargs.get("activations")
    if not weights:
        return PLAIN
    return ", ".join(weights) + (f" x {format_name(activations)}" if activations else "")


def _written_rows(call: Call) -> str:
    """`compress` writes a layer's entries and its index keys, which alone are rotated."""
    cached = call.args[0] if call.op.name == "compress" else None
    if not isinstance(cached, Rows) or cached.format.quant is None:
        return ""
    return "index keys" if cached.format.hadamard else "entries"


def as_text(rows: Sequence[Row]) -> tuple[list[tuple[str, ...]], list[str]]:
    """Lines of op, operands and one cell a device, of the ops that have a choice; and the footnotes of all."""
    notes: list[str] = []
    lines = [(row.op, row.operands, *_texts(row.cells, notes)) for row in rows if row.choice]
    lines.append(("every reference", "multiplies in", *_dtypes(notes)))
    return lines, [f"[{i}] {note}" for i, note in enumerate(notes, 1)]


def markdown(config: ModelConfig, recipes: Iterable[Recipe]) -> str:
    """One table of `recipes` for the ops of `config` that have a choice, equal rows joined, footnotes below.

    Where one op has two answers under a recipe, its name says to what rows each applies.
    """
    notes: list[str] = []
    rows: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for recipe in recipes:
        choices = [row for row in recipe_table(config, recipe) if row.choice]
        quantised = [row for row in choices if row.operands != PLAIN]  # in bf16, none
        answers = [(row, _texts(row.cells, notes)) for row in quantised or choices]
        ops: dict[tuple[str, ...], list[str]] = {}
        for row, cells in answers:
            alone = all(found == cells for other, found in answers if other.op == row.op)
            ops.setdefault(cells, []).append(row.op if alone else f"{row.op} ({row.rows or row.operands})")
        for cells, names in ops.items():
            rows.setdefault((tuple(dict.fromkeys(names)), cells), []).append(recipe.name)
    lines = [(", ".join(names), ", ".join(ops), *cells) for (ops, cells), names in rows.items()]
    lines.append(("all", "what references multiply in", *_dtypes(notes)))
    table = [("recipe", "op", *KINDS), ("---",) * (2 + len(KINDS)), *lines]
    footnotes = [f"{i}. {note}" for i, note in enumerate(notes, 1)]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in table), "", *footnotes]) + "\n"


def _texts(cells: dict[str, Cell], notes: list[str]) -> tuple[str, ...]:
    """Each cell with the number of its footnote, which is added to `notes`."""
    return tuple(_noted(", ".join(cell.runs), _why(cell, device), notes) for device, cell in cells.items())


def _dtypes(notes: list[str]) -> tuple[str, ...]:
    emulated = "XLA emulates bfloat16 where there are no units for it: run with dtype float32"
    kinds = KINDS.values()
    return tuple(_noted(kind.matmul_dtype, "" if kind.has_bfloat16 else emulated, notes) for kind in kinds)


def _why(cell: Cell, device: str) -> str:
    """What was refused, for footnotes that devices share: without the device's name, and each reason once.

    That a kernel is made for another GPU than this goes without saying.
    """
    by_reason: dict[str, list[str]] = {}
    for refusal in cell.refused:
        name, _, reason = refusal.partition(": ")
        if reason.endswith(NO_HOPPER):
            continue
        by_reason.setdefault(reason.replace(device, "the device"), []).append(name)
    if len(by_reason) == 1 and "reference" in cell.runs:  # all that there is refuses for one reason
        return next(iter(by_reason))
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())


def _noted(text: str, note: str, notes: list[str]) -> str:
    if not note:
        return text
    if note not in notes:
        notes.append(note)
    return f"{text} [{notes.index(note) + 1}]"

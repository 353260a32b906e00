"""A checkpoint on disk under a recipe, leaf by leaf: memory for the largest leaf, and a run that can be continued."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsv4 import checkpoint
from dsv4.api import checkpoint_path
from dsv4.checkpoint.errors import CheckpointError
from dsv4.checkpoint.incremental import IncrementalExport
from dsv4.checkpoint.layout import StoredLeaf, StoredTensor
from dsv4.checkpoint.tree import assemble
from dsv4.config import Execution
from dsv4.config.recipe import Recipe
from dsv4.model.handle import Model
from dsv4.parameters import nest, tensor_name
from dsv4.quantize.calibrate import Calibration, calibrate, load_calibration, save_calibration
from dsv4.quantize.leaf import LeafError, copied, exactly_fp8, quantized
from dsv4.quantize.plan import CalibrationRequest, Plan, make_plan
from dsv4.quantize.report import Report, leaf_bytes, leaf_facts, report_of
from dsv4.quantize.source import open_source

Progress = Callable[[str, int, int], None]  # what is being done, how much of it, of how much
Note = Callable[[str], None]


def quantize_checkpoint(
    source: str | Path,
    destination: str | Path,
    recipe: Recipe,
    *,
    calibration: CalibrationRequest | None = None,
    max_shard_bytes: int = 4 << 30,
    progress: Progress = lambda what, done, total: None,
    note: Note = lambda text: None,
) -> Report:
    """Writes the checkpoint `source` under `recipe` to `destination`, which appears when it is complete.

    An interrupted run (or one that ran out of disk) leaves what it has finished in a hidden directory beside it, and
    the same call goes on from there. Calibration loads the whole model; nothing else holds more than a leaf. A research
    model, which comes from an orbax checkpoint, becomes another one, in memory and in one go.

    note: told, in a sentence, what a user should know. Raises ConfigError for a recipe that cannot be applied, naming
    the tensor, or a source that is quantised already; CheckpointError for a source that cannot be read or a destination
    that is not vacant or cannot be written; InputError for a calibration text that cannot be used.
    """
    plan = make_plan(open_source(checkpoint_path(source)), Path(destination), recipe, calibration)
    if plan.research:
        return report_of(plan, _through_memory(plan, progress))
    out = IncrementalExport(plan.destination, plan.config, plan.tensors, plan.identity, max_shard_bytes=max_shard_bytes)
    try:
        with out.session():
            _in_session(plan, out, progress, note)
    except OSError as error:
        if not out.done:
            out.discard()
        kept = f"what is finished is kept in {out.workspace}, and the same command goes on from there"
        raise CheckpointError(
            f"cannot write {destination}: {error}; {kept if out.done else 'nothing was left there'}"
        ) from error
    return report_of(plan, out.done)


def _in_session(plan: Plan, out: IncrementalExport, progress: Progress, note: Note) -> None:
    if out.begun_anew:
        note(f"an unfinished run to {plan.destination} was of another source, recipe or text: starting over")
    elif out.done:
        note(f"going on with an unfinished run: {len(out.done)} of {len(plan.leaves)} parameters are done")
    try:
        known = _calibration(plan, out.workspace / "calibration.npz", progress)
        _write_leaves(plan, known, out, progress)
    except KeyboardInterrupt:
        note(f"{len(out.done)} of {len(plan.leaves)} parameters are done: the same command goes on from there")
        raise
    except ValueError:  # of ours, and it would come again: nothing is worth keeping
        out.discard()
        raise
    out.publish(plan.tokenizer)


def _calibration(plan: Plan, kept: Path | None, progress: Progress) -> Calibration | None:
    """Kept as a file, so that a run that goes on uses the same numbers."""
    if plan.windows is None:
        return None
    if kept is not None and kept.exists():
        return load_calibration(kept)
    model = Model(plan.source.config, plan.source.params(), Execution())
    found = calibrate(
        model,
        plan.windows,
        plan.recipe,
        plan.method,
        progress=lambda done, total: progress("calibrating", done, total),
    )
    if kept is not None:
        save_calibration(found, kept)
    return found


def _write_leaves(plan: Plan, known: Calibration | None, out: IncrementalExport, progress: Progress) -> None:
    sizes = [leaf_bytes(plan, leaf) for leaf in plan.leaves]
    done, total = 0, sum(sizes)
    for leaf, size in zip(plan.leaves, sizes, strict=True):
        if tensor_name(leaf.path) not in out.done:
            error = LeafError()
            for i, (tensor, array) in enumerate(_converted(plan, leaf, known, error)):
                out.write(leaf, tensor, array)
                progress("quantising", done + size * i // len(leaf.tensors), total)
            out.finish(leaf, leaf_facts(leaf, error))
        done += size
        progress("quantising", done, total)


def _converted(
    plan: Plan, leaf: StoredLeaf, known: Calibration | None, error: LeafError
) -> Iterator[tuple[StoredTensor, np.ndarray]]:
    """Every tensor of a leaf of the result. The source's is read here, and freed with the iterator."""
    stored = plan.source.leaves[leaf.path]
    parts = plan.source.read(stored)
    if leaf.format is None or stored.format == leaf.format:
        yield from copied(leaf, parts)
    elif plan.exact:
        yield from exactly_fp8(leaf, stored, parts, error)
    else:
        yield from quantized(leaf, parts["values"], plan.recipe, known, error)


def _through_memory(plan: Plan, progress: Progress) -> dict[str, dict]:
    """A research model: config.json cannot carry it, so the result is an orbax checkpoint like its source."""
    known = _calibration(plan, None, progress)
    tree, facts = {}, {}
    for i, leaf in enumerate(plan.leaves):
        error = LeafError()
        parts: dict[str, Any] = {}
        for tensor, array in _converted(plan, leaf, known, error):
            if tensor.expert is None:
                parts[tensor.part] = array
            else:
                parts.setdefault(tensor.part, []).append(array)
        whole = {part: np.stack(array) if isinstance(array, list) else array for part, array in parts.items()}
        tree[leaf.path] = assemble(leaf, whole)
        facts[tensor_name(leaf.path)] = leaf_facts(leaf, error)
        progress("quantising", i + 1, len(plan.leaves))
    tokenizer = plan.tokenizer
    model = Model(plan.config, nest(tree.items()), Execution(), tokenizer and str(tokenizer))
    checkpoint.save(model, plan.destination)
    return facts

"""Finds the stored tensors of a checkpoint directory and compares them with what its config asks for."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path

from dsv4.checkpoint.errors import CheckpointError
from dsv4.checkpoint.layout import StoredLeaf, StoredTensor
from dsv4.checkpoint.safetensors import Entry, SafetensorsFile

INDEX = "model.safetensors.index.json"
Problems = defaultdict[str, list[str]]

_DSPARK = re.compile(r"dspark|^mtp\.\d+\.(main_proj|main_norm|markov_head|confidence_head)\b")
_DSPARK_REASON = (
    "dspark stages instead of MTP blocks (a later release of V4-Flash), which dsv4 does not support yet; "
    "use the first release, or drop every mtp.* tensor and set num_nextn_predict_layers to 0"
)


def locate(
    directory: Path, wanted: Iterable[StoredLeaf], known: Collection[str], partial: bool
) -> dict[str, SafetensorsFile]:
    """Tensor name -> the open file that holds it, once everything `wanted` is there as it should be.

    known: every tensor name of the whole model; others are extra. partial: only some layers are wanted, so
    that shards without any of their tensors may be absent. Raises one CheckpointError listing all that is
    wrong.
    """
    problems: Problems = defaultdict(list)
    wanted = tuple(wanted)
    names = {tensor.name for leaf in wanted for tensor in leaf.tensors}
    if (directory / INDEX).is_file():
        found, excused = _by_index(directory, names, partial, problems)
    else:
        found, excused = _by_listing(directory, names, problems)
    for leaf in wanted:
        _compare(leaf, found, excused, problems)
    extra = sorted(found.keys() - set(known))
    problems["likely cause"] += _causes(extra)
    problems["tensors this model does not have"] += extra
    if any(problems.values()):
        raise CheckpointError(f"{directory} does not hold the model its config.json describes", problems)
    return found


def _by_index(
    directory: Path, names: set[str], partial: bool, problems: Problems
) -> tuple[dict[str, SafetensorsFile], set[str]]:
    """(tensors by name, names that are not there for a reason already given)."""
    mapping = _read_index(directory, problems)
    needed = {file for name, file in mapping.items() if name in names or not partial}
    opened = {file: _open(directory / file, problems) for file in sorted(needed)}
    found: dict[str, SafetensorsFile] = {}
    disagree = problems[f"{INDEX} disagrees with the files"]
    for file, shard in opened.items():
        if shard is None:
            continue
        for name in shard.entries:
            if (listed := mapping.get(name)) == file:
                found[name] = shard
            else:
                says = f"says {listed}" if listed else "does not list it"
                disagree.append(f"{file} holds {name}, the index {says}")
    absent = {name for name, file in mapping.items() if opened.get(file) and name not in found}
    disagree += [f"{mapping[name]} does not hold {name}, the index says so" for name in sorted(absent)]
    unread = {name for name, file in mapping.items() if file in opened and not opened[file]}
    return found, absent | unread if mapping else names


def _read_index(directory: Path, problems: Problems) -> dict[str, str]:
    try:
        mapping = json.loads((directory / INDEX).read_text())["weight_map"]
        if not isinstance(mapping, dict) or not mapping:
            raise ValueError("weight_map is empty, or no object")
        for name, file in mapping.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{name} is mapped to {file!r}, expected a file name")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        problems["broken file"].append(f"{INDEX}: {type(error).__name__}: {error}")
        return {}
    return mapping


def _by_listing(directory: Path, names: set[str], problems: Problems) -> tuple[dict[str, SafetensorsFile], set[str]]:
    """As `_by_index`, for a directory without an index: one file, or several that say so in their names."""
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        problems["missing file"].append(f"model.safetensors, or {INDEX} and its shards")
    for last in {int(match[1]) for path in paths if (match := re.search(r"-of-(\d{5})\.", path.name))}:
        expected = {f"model-{i:05}-of-{last:05}.safetensors" for i in range(1, last + 1)}
        problems["missing file"] += sorted(expected - {path.name for path in paths})
    opened = [_open(path, problems) for path in paths]
    found: dict[str, SafetensorsFile] = {}
    for shard in filter(None, opened):
        for name in shard.entries:
            if name in found:
                problems["tensors stored twice"].append(f"{name}: {found[name].path.name}, {shard.path.name}")
            found[name] = shard
    return found, names if problems["missing file"] or not all(opened) else set()


def _open(path: Path, problems: Problems) -> SafetensorsFile | None:
    try:
        return SafetensorsFile(path)
    except FileNotFoundError:
        problems["missing file"].append(path.name)
    except CheckpointError as error:
        problems["broken file"] += [f"{path.name}: {text}" for text in error.problems["broken file"]]
    except OSError as error:
        problems["broken file"].append(f"{path.name}: {error.strerror}")
    return None


def _compare(leaf: StoredLeaf, found: dict[str, SafetensorsFile], excused: Collection[str], problems: Problems) -> None:
    stored = {t.name: found[t.name].entries[t.name] for t in leaf.tensors if t.name in found}
    for tensor in leaf.tensors:
        entry = stored.get(tensor.name)
        if entry is None:
            if tensor.name not in excused:
                problems["missing tensors"].append(tensor.name)
        elif text := _wrong(leaf, tensor, entry):
            problems["wrong shape or dtype"].append(f"{tensor.name} {text}")
    dtypes = {stored[t.name].dtype for t in leaf.tensors if t.part == "values" and t.name in stored}
    if leaf.format is None and len(dtypes) > 1 and dtypes <= set(leaf.tensors[0].dtypes):
        problems["wrong shape or dtype"].append(
            f"{leaf.tensors[0].name} and its fellow experts have dtypes {', '.join(sorted(dtypes))}"
        )


def _wrong(leaf: StoredLeaf, tensor: StoredTensor, entry: Entry) -> str | None:
    if entry.dtype not in tensor.dtypes:
        asked = f"{' or '.join(tensor.dtypes)} {list(tensor.shape)}"
        hint = ""
        if leaf.spec.kind == "expert" and entry.dtype in ("I8", "U8", "F8_E4M3"):
            hint = '; packed FP4 is "expert_dtype": "fp4", E4M3 is "fp8"'
        return f"is {entry}, config.json asks for {asked} ({leaf.reason}{hint})"
    if entry.shape != tensor.shape:
        return f"has shape {list(entry.shape)}, the sizes in config.json give {list(tensor.shape)}"
    return None


def _causes(extra: list[str]) -> list[str]:
    """What tensors that the model does not have are known to come from."""
    dspark = any(_DSPARK.search(name) for name in extra)
    causes = {
        _DSPARK_REASON: dspark,
        "mtp.* without num_nextn_predict_layers in config.json: set it, or drop them": (
            not dspark and any(name.startswith("mtp.") for name in extra)
        ),
        "model.* are names of transformers; the original ones are read (layers.0.attn.wq_a.weight)": any(
            name.startswith("model.") for name in extra
        ),
        "*.scale of weights that are not quantised by quantization_config in config.json": any(
            name.endswith(".scale") for name in extra
        ),
    }
    return [cause for cause, applies in causes.items() if applies]

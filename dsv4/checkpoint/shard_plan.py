"""Which tensor goes to which file of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from dsv4.checkpoint.safetensors_write import Planned


def plan_shards[T: Planned](tensors: Iterable[T], limit: int) -> dict[str, list[T]]:
    """File name -> its tensors, in order; a file holds at most `limit` bytes of data, or one tensor."""
    shards: list[list[T]] = [[]]
    room = limit
    for tensor in tensors:
        if tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(tensor)
        room -= tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def index_text(shards: Mapping[str, Sequence[Planned]]) -> str:
    """The index file that a checkpoint of several shards has."""
    mapping = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
    size = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(mapping.items()))}
    return json.dumps(index, indent=2) + "\n"

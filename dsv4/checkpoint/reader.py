"""Released checkpoint -> (ModelConfig, parameter tree): checked as a whole, then loaded in parallel.

Memory: besides the tree, one leaf in flight a worker. Experts are copied from the mapped file straight into
their slice of the stacked leaf, and mapped pages are given back chunk by chunk. On a CPU device jax takes
over the buffer a leaf was copied into (it is aligned to 64 bytes, which `device_put` needs in order not to
copy), so that no leaf ever exists twice; on other devices the buffer is freed once it has been transferred.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv4.checkpoint.errors import CheckpointError
from dsv4.checkpoint.layout import StoredLeaf, stored_leaves
from dsv4.checkpoint.safetensors import DTYPES, SafetensorsFile
from dsv4.checkpoint.shards import locate
from dsv4.checkpoint.transfer import transfer
from dsv4.checkpoint.tree import assemble, bad_treatment
from dsv4.config.model import ModelConfig
from dsv4.config.released import read_released
from dsv4.parameters import nest

ALIGNMENT = 64  # bytes; what XLA's CPU client needs to alias a host buffer


def read(
    directory: str | Path,
    *,
    layers: range | None = None,
    workers: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ModelConfig, dict[Any, Any]]:
    """Reads a checkpoint in the released layout: config.json and safetensors, sharded or not.

    Returns the config and the tree of `dsv4.parameters.model_specs`: nested dicts with int layer keys, whose
    leaves are jax arrays in the dtype of the file (hash tables: int32), or QuantTensor or TreatedWeight where
    config.json says so. Arrays go to jax's default device.

    layers: read only these, with embedding, head and norms; they are renumbered from 0, and the config
    returned has only them and no MTP blocks. Shards that hold none of it need not be there. progress: called
    with (bytes done, bytes in all) from the calling thread.

    Raises ConfigError for a config.json that cannot be read; CheckpointError listing everything wrong with
    the files (before any weight is loaded), or naming weights that are not finite numbers; ValueError for bad
    `layers`.
    """
    directory = Path(directory)
    config, wanted, files = open_files(directory, layers)
    reduced = config if layers is None else take_layers(config, layers)
    return reduced, _load(directory, wanted, files, workers, progress)


def open_files(
    directory: Path, layers: range | None = None
) -> tuple[ModelConfig, tuple[StoredLeaf, ...], dict[str, SafetensorsFile]]:
    """(the whole config, the leaves wanted, tensor name -> its open file); no weight is read. Raises as `read`."""
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} is no released checkpoint: no config.json{_hint(directory)}")
    config = read_released(directory)
    if layers is not None:
        take_layers(config, layers)
    wanted = tuple(stored_leaves(config, layers))
    whole = wanted if layers is None else stored_leaves(config)
    known = {tensor.name for leaf in whole for tensor in leaf.tensors}
    return config, wanted, locate(directory, wanted, known, partial=layers is not None)


def take_layers(config: ModelConfig, layers: range) -> ModelConfig:
    """The config of the model made of `layers` of `config` alone. Raises ValueError for a range not in it."""
    count = len(config.layers)
    if layers.step != 1 or not 0 <= layers.start < layers.stop <= count:
        raise ValueError(f"layers is {layers}: give range(a, b) with 0 <= a < b <= {count}")
    hashed = len(range(layers.start, min(layers.stop, config.moe.hash_layers)))
    return dataclasses.replace(
        config,
        layers=config.layers[layers.start : layers.stop],
        moe=dataclasses.replace(config.moe, hash_layers=hashed),
        mtp_blocks=0,
    )


def _hint(directory: Path) -> str:
    if (directory / "_CHECKPOINT_METADATA").is_file():
        return "; it is an orbax checkpoint, which dsv4.checkpoint.restore reads"
    return "" if directory.is_dir() else " (there is no such directory)"


def _load(
    directory: Path,
    leaves: Sequence[StoredLeaf],
    files: dict[str, SafetensorsFile],
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> dict[Any, Any]:
    sizes = [sum(files[t.name].entries[t.name].nbytes for t in leaf.tensors) for leaf in leaves]
    done, total = 0, sum(sizes)
    device = jax.config.jax_default_device  # a context of this thread, which workers do not see
    with ThreadPoolExecutor(workers, thread_name_prefix="dsv4-read") as pool:
        futures = [pool.submit(_load_leaf, leaf, files, device) for leaf in leaves]
        size = dict(zip(futures, sizes, strict=True))
        try:
            for future in as_completed(futures):
                future.result()
                done += size[future]
                if progress is not None:
                    progress(done, total)
        except CheckpointError:
            pool.shutdown(cancel_futures=True)  # waits for the leaves in flight: they may have complaints too
            raise _merged(directory, futures) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return nest((leaf.path, future.result()) for leaf, future in zip(leaves, futures, strict=True))


def _merged(directory: Path, futures: Sequence[Future]) -> CheckpointError:
    problems: dict[str, list[str]] = defaultdict(list)
    for future in futures:
        if not future.cancelled() and isinstance(error := future.exception(), CheckpointError):
            for kind, found in error.problems.items():
                problems[kind] += found
    return CheckpointError(f"{directory} holds weights that cannot be used; nothing was loaded", problems)


def _load_leaf(leaf: StoredLeaf, files: dict[str, SafetensorsFile], device: Any) -> Any:
    buffers = read_leaf(leaf, files)
    return assemble(leaf, {part: _place(buffers.pop(part), device) for part in tuple(buffers)})


def read_leaf(leaf: StoredLeaf, files: dict[str, SafetensorsFile]) -> dict[str, np.ndarray]:
    """The arrays of one leaf, by part, on the host. Raises CheckpointError naming elements that no weight can have."""
    first = leaf.tensors[0]
    own = DTYPES[files[first.name].entries[first.name].dtype]
    buffers = {part: aligned_empty(shape, dtype or own) for part, (shape, dtype) in leaf.parts.items()}
    bad = []
    for tensor in leaf.tensors:
        buffer = buffers[tensor.part]
        destination = buffer if tensor.expert is None else buffer[tensor.expert]
        if problem := transfer(files[tensor.name].chunks(tensor.name), destination, leaf.experts):
            bad.append(f"{tensor.name}{problem}")
    if bad := bad or bad_treatment(leaf, buffers):
        raise CheckpointError("bad weights", {"values that are no weights": bad})
    return buffers


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array whose memory starts at a multiple of ALIGNMENT."""
    nbytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


def _place(buffer: np.ndarray, device: Any) -> jax.Array:
    """Hands `buffer` to jax for good: on a CPU device the array returned is that memory."""
    with jax.default_device(device):
        return jax.device_put(buffer, may_alias=True).block_until_ready()

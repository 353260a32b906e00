"""A checkpoint in the released layout, written leaf by leaf in any number of sittings.

Everything lies in a hidden directory beside the destination until all of it is there; then it is renamed. What has been
finished is noted in a journal, after its data have reached the disk, so that a run that was killed, at any moment, is
continued by one with the same `identity`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

from dsv4.checkpoint.errors import CheckpointError
from dsv4.checkpoint.layout import StoredLeaf, StoredTensor
from dsv4.checkpoint.safetensors_write import Planned, header, write_tensor
from dsv4.checkpoint.shard_plan import index_text, plan_shards
from dsv4.checkpoint.shards import INDEX
from dsv4.checkpoint.transfer import checked
from dsv4.checkpoint.writer import require_vacant
from dsv4.config.model import ModelConfig
from dsv4.config.released import write_released
from dsv4.parameters import tensor_name

STATE, JOURNAL = "state.json", "journal.jsonl"


class IncrementalExport:
    """Tensors to be written to `directory`, in any order.

    done: name of each finished leaf -> the facts noted with it. begun_anew: an unfinished run was there, of other
    `identity` (any JSON data that says what is being made from what), and was removed.
    """

    def __init__(
        self, directory: Path, config: ModelConfig, tensors: Sequence[Planned], identity: Any, *, max_shard_bytes: int
    ) -> None:
        self.directory = directory.absolute()
        self.workspace = self.directory.with_name(f".{self.directory.name}.unfinished")
        self.files = self.workspace / "new"
        self.done: dict[str, dict[str, Any]] = {}
        self.begun_anew = False
        self._shards = plan_shards(tensors, max_shard_bytes)
        self._planned = {tensor.name: tensor for tensor in tensors}
        self._open: dict[str, BinaryIO] = {}
        self._journal: TextIO
        self._places: dict[str, tuple[str, int]] = {}  # tensor -> (file, where its data starts)
        self._starts: dict[str, bytes] = {}
        for name, planned in self._shards.items():
            self._starts[name], places = header(planned)
            self._places |= {tensor: (name, place) for tensor, place in places.items()}
        counts = {name: len(planned) for name, planned in self._shards.items()}
        self._identity = json.loads(json.dumps({"identity": identity, "shards": counts}))  # as it will be read back
        self._config = config

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Opens what there is, or begins; what is finished in the block stays, whatever ends it.

        Raises CheckpointError if the destination is not vacant, or while another run writes to it; OSError.
        """
        require_vacant(self.directory)
        self.workspace.mkdir(parents=True, exist_ok=True)
        with open(self.workspace / "lock", "wb") as lock:
            _lock(lock, self.directory)
            if not self._resumable():
                self._begin()
            try:
                self._read_journal()
                with open(self.workspace / JOURNAL, "a", encoding="utf-8") as journal:
                    self._journal = journal
                    yield
            finally:
                for file in self._open.values():
                    file.close()
                self._open.clear()

    def write(self, leaf: StoredLeaf, tensor: StoredTensor, array: np.ndarray) -> None:
        """Writes the elements of one tensor, refusing those that no weight can have."""
        planned = self._planned[tensor.name]
        name, place = self._places[tensor.name]
        file = self._file(name)
        file.seek(place)
        flat = np.ascontiguousarray(array).reshape(-1)
        write_tensor(file, planned, checked(flat, tensor.name, tensor.shape, planned.dtype, leaf.experts))

    def finish(self, leaf: StoredLeaf, facts: dict[str, Any]) -> None:
        """Notes that all tensors of a leaf are written, with `facts` (JSON data) for whoever goes on."""
        for name in {self._places[tensor.name][0] for tensor in leaf.tensors}:
            self._file(name).flush()
            os.fsync(self._file(name).fileno())
        name = tensor_name(leaf.path)
        self._journal.write(json.dumps({"leaf": name, "facts": facts}) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self.done[name] = facts

    def publish(self, tokenizer: Path | None) -> None:
        """Completes the directory and renames it to the destination. Every leaf must be finished; call it last."""
        for file in self._open.values():
            file.close()
        self._open.clear()
        write_released(self._config, self.files / "config.json")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, self.files / "tokenizer.json")
        if len(self._shards) > 1:
            (self.files / INDEX).write_text(index_text(self._shards))
        os.replace(self.files, self.directory)
        self.discard()

    def discard(self) -> None:
        """Removes all that is unfinished."""
        shutil.rmtree(self.workspace, ignore_errors=True)

    def _resumable(self) -> bool:
        try:
            state = json.loads((self.workspace / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        self.begun_anew = state != self._identity
        sizes = {name: self._size(name) for name in self._shards}
        return not self.begun_anew and all(
            (self.files / name).is_file() and (self.files / name).stat().st_size == size for name, size in sizes.items()
        )

    def _begin(self) -> None:
        """Files of their final size, headers in place; the state last, so that with it all of them are there."""
        shutil.rmtree(self.files, ignore_errors=True)
        for path in self.workspace.iterdir():
            if path.name != "lock":
                path.unlink()
        self.files.mkdir()
        for name, start in self._starts.items():
            with open(self.files / name, "wb") as file:
                file.write(start)
                file.truncate(self._size(name))
                file.flush()
                os.fsync(file.fileno())
        partial = self.workspace / (STATE + ".partial")
        partial.write_text(json.dumps(self._identity), encoding="utf-8")
        partial.replace(self.workspace / STATE)

    def _read_journal(self) -> None:
        """Leaves noted as finished. A last line that was cut off is cut away: its leaf is done again."""
        path = self.workspace / JOURNAL
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            os.truncate(path, len(whole.encode()))
        for line in whole.splitlines():
            entry = json.loads(line)
            self.done[entry["leaf"]] = entry["facts"]

    def _size(self, name: str) -> int:
        return len(self._starts[name]) + sum(tensor.nbytes for tensor in self._shards[name])

    def _file(self, name: str) -> BinaryIO:
        if name not in self._open:
            self._open[name] = open(self.files / name, "r+b")
        return self._open[name]


def _lock(file: BinaryIO, directory: Path) -> None:
    """Held until the file is closed, by the process's end if by nothing else."""
    try:
        import fcntl
    except ImportError:  # not on this system: two runs at once are the user's to avoid
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(f"{directory} is being written by another run: wait for it, or name another") from None


__all__ = ["IncrementalExport"]

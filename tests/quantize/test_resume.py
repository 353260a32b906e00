"""Interrupted, killed, out of disk: DST is absent or complete, and the same command goes on to the same bytes."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest

from dsv4.checkpoint import CheckpointError
from dsv4.checkpoint.incremental import JOURNAL, IncrementalExport
from dsv4.quantize.convert import quantize_checkpoint

SHARD = 20_000  # bytes: several files
KILLED = """
import os, signal, sys
from dsv4.checkpoint.incremental import IncrementalExport
from dsv4.config import RECIPES
from dsv4.quantize.convert import quantize_checkpoint
write = IncrementalExport.write
def dying(self, leaf, tensor, array):
    write(self, leaf, tensor, array)
    if len(self.done) == 30:
        os.kill(os.getpid(), signal.SIGKILL)
IncrementalExport.write = dying
quantize_checkpoint(sys.argv[1], sys.argv[2], RECIPES["fp8"], max_shard_bytes=int(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def whole(source, tools, tmp_path_factory):
    """What an uninterrupted run writes."""
    directory = tmp_path_factory.mktemp("whole") / "out"
    quantize_checkpoint(source, directory, tools.VARIANTS["fp8"], max_shard_bytes=SHARD)
    found = tools.content(directory)
    assert len([name for name in found if name.endswith(".safetensors")]) > 5
    return found


@pytest.fixture
def stopping(monkeypatch):
    """Makes the export raise an error once so many leaves are done, in the middle of the next."""

    def arm(error, after):
        write = IncrementalExport.write

        def failing(self, leaf, tensor, array):
            write(self, leaf, tensor, array)
            if len(self.done) >= after:
                raise error

        monkeypatch.setattr(IncrementalExport, "write", failing)

    return arm


def run(source, destination, recipe, **options):
    notes = []
    report = quantize_checkpoint(source, destination, recipe, max_shard_bytes=SHARD, note=notes.append, **options)
    return report, notes


def unfinished(destination):
    return destination.with_name(f".{destination.name}.unfinished")


def test_an_interrupted_run_is_continued(source, whole, tools, tmp_path, stopping, monkeypatch):
    out, recipe, notes = tmp_path / "out", tools.VARIANTS["fp8"], []
    stopping(KeyboardInterrupt(), after=20)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, out, recipe, max_shard_bytes=SHARD, note=notes.append)
    assert not out.exists() and "20 of" in notes[-1] and "the same command goes on" in notes[-1]
    monkeypatch.undo()
    report, notes = run(source, out, recipe)
    assert "going on with an unfinished run: 20 of" in notes[0]
    assert tools.content(out) == whole and not unfinished(out).exists()
    again, _ = run(source, tmp_path / "other", recipe)
    assert report == again


def test_a_killed_run_is_continued(source, whole, tools, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(source), str(out), str(SHARD)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -9, done.stderr
    assert not out.exists()
    with (unfinished(out) / JOURNAL).open("a") as journal:
        journal.write('{"leaf": "layers.0.attn.wo')  # the last line may be cut off
    _, notes = run(source, out, tools.VARIANTS["fp8"])
    assert "30 of" in notes[0] and tools.content(out) == whole


def test_a_full_disk_keeps_what_is_done(source, whole, tools, tmp_path, stopping, monkeypatch):
    out = tmp_path / "out"
    stopping(OSError(errno.ENOSPC, "No space left on device"), after=10)
    with pytest.raises(CheckpointError, match="cannot write .*No space left.*kept in .*the same command goes on"):
        run(source, out, tools.VARIANTS["fp8"])
    assert not out.exists()
    monkeypatch.undo()
    run(source, out, tools.VARIANTS["fp8"])
    assert tools.content(out) == whole


def test_no_room_for_anything_leaves_nothing(source, tools, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot write .*File too large; nothing was left there"):
            run(source, tmp_path / "out", tools.VARIANTS["fp8"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tools.nothing_at(tmp_path / "out")


def test_another_recipe_or_source_starts_over(source, whole, tools, tmp_path, stopping, monkeypatch):
    copy, out = shutil.copytree(source, tmp_path / "source"), tmp_path / "out"
    for change in ("recipe", "file"):
        stopping(KeyboardInterrupt(), after=3)
        with pytest.raises(KeyboardInterrupt):
            run(copy, out, tools.VARIANTS["released" if change == "recipe" else "fp8"])
        monkeypatch.undo()
        if change == "file":
            os.utime(copy / "model.safetensors")
        _, notes = run(copy, out, tools.VARIANTS["fp8"])
        assert len(notes) == 1 and "starting over" in notes[0]
        assert tools.content(out) == whole
        shutil.rmtree(out)


def test_damage_to_what_is_unfinished_starts_over(source, whole, tools, tmp_path, stopping, monkeypatch):
    out = tmp_path / "out"
    stopping(KeyboardInterrupt(), after=3)
    with pytest.raises(KeyboardInterrupt):
        run(source, out, tools.VARIANTS["fp8"])
    monkeypatch.undo()
    next((unfinished(out) / "new").glob("*.safetensors")).unlink()
    run(source, out, tools.VARIANTS["fp8"])
    assert tools.content(out) == whole


def test_two_runs_at_once(source, tools, tmp_path):
    out, problems = tmp_path / "out", []

    def progress(what, done, total):
        if not problems:
            with pytest.raises(CheckpointError, match="is being written by another run") as caught:
                run(source, out, tools.VARIANTS["fp8"])
            problems.append(caught.value)

    run(source, out, tools.VARIANTS["fp8"], progress=progress)
    assert problems and json.loads((out / "config.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_progress_is_in_bytes_of_the_source(source, tools, tmp_path):
    seen = []
    report, _ = run(source, tmp_path / "out", tools.VARIANTS["fp8"], progress=lambda *now: seen.append(now))
    assert {what for what, _, _ in seen} == {"quantising"} and {total for _, _, total in seen} == {report.bytes_before}
    done = [done for _, done, _ in seen]
    assert done == sorted(done) and done[-1] == report.bytes_before

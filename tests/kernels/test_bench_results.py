"""What is made of benchmark results: tables of tilings, Markdown, files that are replaced as a whole."""

import dataclasses
import json

import pytest

from pallas_kernels.bench import report, results
from pallas_kernels.block_matmul.table import TableError
from pallas_kernels.block_matmul.tiling import FewRows


def result(which, us, case="one", problem="m=8 n=64 k=128", stages=2, **changes):
    return {
        "op": "block_matmul", "case": case, "tuning": True, "device": "NVIDIA H100 80GB HBM3", "which": which,
        "kind": "few_rows", "problem": problem, "tiling": dataclasses.asdict(FewRows(stages=stages)), "us": us,
        "tflops": 123.4, "gbps": 2345.6, "share": 0.875, "bound": "bytes", "xla_us": 20.0, "peer_us": 12.0,
        "ratio": 1.2, "reason": None,
    } | changes  # fmt: skip


def test_the_table_keeps_the_fastest_tilings(tmp_path, monkeypatch):
    folder = tmp_path / "block_matmul"
    folder.mkdir()
    other = "m=16 n=64 k=128"
    rows = [result("a", 9.0), result("b", 4.0, stages=3), result("c", None, stages=4), result("d", 5.0, problem=other)]
    assert results.write_tables(rows, tmp_path) == [folder / "tiling_h100.json"]
    table = json.loads((folder / "tiling_h100.json").read_text())
    best = dataclasses.asdict(FewRows(stages=3)) | {"us": 4.0, "on": "H100"}
    assert table == {
        "few_rows": {"m=8 n=64 k=128": best, other: dataclasses.asdict(FewRows(stages=2)) | {"us": 5.0, "on": "H100"}}
    }
    # A later measurement replaces its own problem alone, slower or not: the kernel has changed.
    results.write_tables([result("a", 6.0, stages=5, device="NVIDIA H200")], tmp_path)
    table = json.loads((folder / "tiling_h100.json").read_text())["few_rows"]
    assert table["m=8 n=64 k=128"]["stages"] == 5 and other in table
    assert (table["m=8 n=64 k=128"]["on"], table[other]["on"]) == ("H200", "H100")
    with pytest.raises(TableError, match="was measured on NVIDIA B200"):
        results.write_tables([result("a", 1.0, device="NVIDIA B200")], tmp_path)
    before = (folder / "tiling_h100.json").read_text()
    with pytest.raises(TableError, match="measured on NVIDIA H100 80GB HBM3 and on NVIDIA H200: one device"):
        results.write_tables([result("a", 2.0), result("b", 1.0, device="NVIDIA H200")], tmp_path)
    assert (folder / "tiling_h100.json").read_text() == before


def test_files_are_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    results.write(path, "old")
    assert path.stat().st_mode & 0o777 == 0o644

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(results.os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        results.write(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_markdown():
    rows = [
        result("slow", 11.0),
        result("fast", 10.0),
        result("fails", None, tflops=None, gbps=None, share=None, ratio=None),
        result("one", 8.25, case="two", tuning=False, bound="flops", peer_us="ImportError: torch", ratio=None),
        result("one", 2.0, case="two"),
    ]
    assert report.markdown(rows).splitlines()[2:] == [
        "| block_matmul: one | 10.0 | 2346 GB/s | 88 % | 20.0 | 12.0 | 1.20 |",
        "| block_matmul: two | 8.2 | 123 TFLOP/s | 88 % | 20.0 | failed | - |",
        "",
        "- block_matmul: two: the peer failed: ImportError: torch",
    ]

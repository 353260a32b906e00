"""What warpgroups do with their time: summed up from traces, and noted by kernels that are asked to."""

import dataclasses

import jax
import pytest

from pallas_kernels.bench import block_matmul, grouped_matmul, hyper_connection, router, sparse_attention
from pallas_kernels.bench.timeline import Phase, Role, main, roles, run, table
from pallas_kernels.device import KINDS, pretend
from pallas_kernels.mosaic.launch import compiler_params, timeline


def events(tid, *phases):
    """Of a warpgroup: (name, when it is entered, when it is left), in cycles, in the order of entering."""
    edges = [edge for name, begin, end in phases for edge in ((begin, "B", name), (end, "E", name))]
    return [{"name": name, "ph": ph, "ts": 7 + at / 1e3, "pid": 1, "tid": tid} for at, ph, name in sorted(edges)]


def test_warpgroups_alike_are_summed_up_together():
    """A phase within another counts for both; medians over warpgroups."""
    loads = (events(tid, ("load", 0, 50), ("wait", 60, 60 + long)) for tid, long in ((1, 10), (3, 20), (5, 90)))
    outer = events(2, ("block", 0, 100), ("add", 10, 40), ("block", 200, 300), ("add", 210, 250))
    found = roles({"traceEvents": [*outer, *(event for of in loads for event in of)]})
    assert [(role.warpgroups, round(role.cycles)) for role in found] == [(1, 300), (3, 80)]
    numbers = [[(name, times, round(cycles)) for name, times, cycles in role.phases] for role in found]
    assert numbers == [[("block", 2, 200), ("add", 2, 70)], [("load", 1, 50), ("wait", 1, 20)]]


def test_the_table():
    text = table(Role(3, 80.0, (Phase("load", 2, 50.0),)))
    assert text.splitlines()[0] == "3 warpgroups, 80 cycles"
    assert text.splitlines()[2].split() == ["load", "2", "50", "25", "62%"]


def test_kernels_have_room_for_it(tmp_path, monkeypatch):
    """Only a GPU runs what fetches the notes; all else is lowered here."""
    monkeypatch.setattr(jax.debug, "callback", lambda *args, **kwargs: None)
    named = (
        (sparse_attention, "flash b=128 t=1 "),
        (hyper_connection, "pre flash m=128"),
        (router, "flash router m=8"),
        (block_matmul, "flash down m=4096"),
        (block_matmul, "flash wq_b m=4096"),
        (grouped_matmul, "prefill 32x256 down"),
    )
    for op, name in named:
        case = next(case for case in op.benches() if case.name.startswith(name))
        with pretend(KINDS["H100 / H200"]), timeline(tmp_path):
            jax.jit(case.ours[case.usual]).trace(case.shapes()).lower(lowering_platforms=("cuda",))


def test_it_is_asked_for():
    assert compiler_params(approx_math=True).profile_space == 0
    with timeline("/somewhere", 5):
        assert (compiler_params().profile_dir, compiler_params().profile_space) == ("/somewhere", 5)


def test_without_a_gpu_nothing_is_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert main(["sparse_attention", "--only", "b=128", "--to", str(tmp_path / "new")]) == 0
    assert "was not run" in capsys.readouterr().out and not (tmp_path / "new").exists()
    with pytest.raises(SystemExit):
        main(["sparse_attention", "--only", "no such case", "--to", str(tmp_path)])
    assert "'no such case'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sparse_attention", "--which", "other", "--to", str(tmp_path)])
    assert "no 'other': there are sm90" in capsys.readouterr().err


def test_the_second_launch_is_the_one_that_counts(tmp_path):
    """Launches of a kernel write to the same file, and leave one alone that there is."""
    (tmp_path / "other.json").write_text("{}")
    launches = []

    def launch(inputs):
        jax.debug.callback(write, inputs)
        return inputs

    def write(inputs):
        launches.append(int(inputs))
        if not (path := tmp_path / "kernel.json").exists():
            path.write_text(f"{int(inputs)}")

    case = sparse_attention.bench(sparse_attention.BENCH[0])
    sets = [jax.numpy.int32(i) for i in (7, 8)]
    case = dataclasses.replace(case, ours={"it": launch})
    object.__setattr__(case, "sets", lambda count: sets[:count])
    assert run(case, "it", tmp_path, 5) == [tmp_path / "kernel.json"]
    assert launches == [7, 8] and (tmp_path / "kernel.json").read_text() == "8"

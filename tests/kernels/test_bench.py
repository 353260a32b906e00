"""The benchmark command without a GPU, and its judgement of results."""

import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench import __main__ as command
from pallas_kernels.bench import (
    block_matmul,
    expert_layer,
    grouped_matmul,
    measure,
    one_scale,
    peer_files,
    peers,
    results,
    turns,
)
from pallas_kernels.bench.case import Bench, Choice, disagreement
from pallas_kernels.bench.operands import weights_of
from pallas_kernels.bench.timing import input_sets, timed_calls
from pallas_kernels.block_matmul.cases import MatmulCase
from pallas_kernels.block_matmul.tiling import FewRows
from pallas_kernels.block_matmul.tilings import Problem
from pallas_kernels.grouped_matmul.cases import GroupedCase, LayerCase
from pallas_kernels.mosaic import interpreted
from pallas_kernels.router import router


def bench(*arguments):
    """Where there is no GPU, or none that is used."""
    command = [sys.executable, "-m", "pallas_kernels.bench", *arguments]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env)


def test_without_a_gpu_the_cases_are_listed(tmp_path):
    done = bench("block_matmul", "--only", "m=128", "--json", tmp_path / "rows.jsonl")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) == 7 and all("limit" in line for line in lines[:-1])
    assert "6 cases; no GPU here" in lines[-1] and "none was timed" in lines[-1]
    assert not list(tmp_path.iterdir())


def test_an_unknown_op_is_named():
    done = bench("matmul")
    assert done.returncode == 2 and "no benchmark of matmul: there are block_matmul" in done.stderr


def refusal(capsys, *arguments):
    """What the command says where it exits with 2."""
    with pytest.raises(SystemExit) as stopped:
        command.main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_text_in_no_case_is_named(capsys):
    error = refusal(capsys, "router", "--only", "zzz")
    assert "--only 'zzz' is in the name of none of the 7 cases of router" in error and "'flash router m=1'" in error


@pytest.mark.parametrize("use", ["--markdown", "--table"])
def test_files_that_are_not_there_are_named(capsys, tmp_path, use):
    (tmp_path / "rows.jsonl").touch()
    error = refusal(capsys, use, tmp_path / "row.jsonl")
    assert f"no file {tmp_path / 'row.jsonl'}" in error and f"{tmp_path} has rows.jsonl" in error


def peers_in(directory, init="__version__ = '2.5.0'\n"):
    (directory / "deep_gemm").mkdir(parents=True)
    (directory / "deep_gemm" / "__init__.py").write_text(init)
    (directory / "deep_gemm" / "_C.cpython-312-x86_64-linux-gnu.so").write_bytes(b"products")
    return directory


def test_a_directory_without_peers_is_refused(capsys, tmp_path):
    (tmp_path / "other").touch()
    error = refusal(capsys, "router", "--peers", tmp_path)
    assert f"no peer in {tmp_path}: it holds other" in error and "folder deep_gemm" in error
    assert "it is no directory" in refusal(capsys, "router", "--peers", tmp_path / "other")
    peer_files.require(peers_in(tmp_path))
    assert peer_files.missing(tmp_path) == ["_flashmla_C.abi3.so"]


def test_versions_of_peers(tmp_path):
    told = peer_files.version(peers_in(tmp_path / "a"), "gemm")
    untold = peer_files.version(peers_in(tmp_path / "b", ""), "gemm")
    name, version, digest = told.split()
    assert (name, version) == ("DeepGEMM", "2.5.0") and untold == f"DeepGEMM {digest}"
    assert peer_files.version(tmp_path / "a", "flashmla") is None
    (tmp_path / "b" / "_flashmla_C.abi3.so").write_bytes(b"attention")
    assert peer_files.version(tmp_path / "b", "flashmla").startswith("FlashMLA sha256:")


def test_wrong_results_are_seen():
    want = np.random.default_rng(0).normal(size=(8, 256))
    assert disagreement(want, want) is None
    assert disagreement(want * (1 + 2**-9), want) is None
    assert "relative error" in disagreement(want * 1.01, want)
    one = want.copy()
    one[3, 5] += 0.1
    assert "worst element" in disagreement(one, want)
    one[3, 5] = np.nan
    assert disagreement(one, want) == "NaN in 1 places, 0 expected"
    want[3, 5] = np.nan
    assert disagreement(one, want) is None
    one[4, 4] = np.inf
    assert "relative error" in disagreement(one, want)


def test_inputs_overflow_the_cache():
    assert input_sets(16_000_000) == 16 and input_sets(10**9) == 2 and input_sets(1) == 64
    assert input_sets(6 * 10**9) == 1
    assert timed_calls(1) == 60 and timed_calls(64) == 64


@pytest.mark.parametrize("m", [1, 128])
def test_a_case_computes_what_it_says(m):
    """XLA's side against the reference, and rows that pad the problem are no part of it."""
    case = block_matmul.bench(MatmulCase("small", m, 128, 256))
    sets = case.sets(1)[0]
    want = case.reference(sets)
    assert want.shape == (m, 128) and case.flops == 2 * m * 128 * 256
    assert case.wrong(case.xla["dequantised bf16"](sets), want) is None
    assert case.usual in case.ours and case.ours.keys() == case.choices.keys() and case.limit > 0


def test_every_rows_of_a_block_is_the_same_product():
    """Rows of few experts are checked, whatever they are padded to."""
    case = grouped_matmul.bench(GroupedCase("small", 11, 128, 256, (16, 8), weights=2, experts=6, hit=4))
    sets = case.sets(1)[0]
    want = case.reference(sets)
    assert want.shape == (3 * 11, 128) and case.flops == 2 * 44 * 128 * 256 * 2
    assert case.nbytes == 4 * (2 * 128 * 256 + 11 * (256 + 2 * 128))
    names = [next(name for name in case.ours if name.startswith(f"rows={rows} ")) for rows in (16, 8)]
    assert case.usual in case.ours
    with interpreted():
        got = [jax.block_until_ready(case.ours[name](sets)) for name in names]
    assert [result.shape for result in got] == [(4 * 16, 128), (4 * 16, 128)]
    assert [case.wrong(result, want) for result in got] == [None, None]
    assert "NaN" in case.wrong(got[0].at[0].set(jnp.nan), want)


def test_xla_multiplies_experts_in_a_batch():
    case = grouped_matmul.bench(GroupedCase("small", 3, 128, 256, (8,), experts=4, hit=4, peer="masked"))
    sets = case.sets(1)[0]
    got = case.xla["dequantised bf16"](sets)[0].reshape(-1, 128)
    assert case.wrong(got, case.reference(sets)) is None
    assert case.peer == ("masked", 4, 3, 128, 256)


def test_a_layer_computes_what_it_says():
    case = expert_layer.bench(LayerCase("small", 5, 256, 128, 6, 2))
    (x, routing), weights = sets = case.sets(1)[0]
    assert x.shape == (5, 256) and routing.counts.sum() == 10 and len(weights) == 3
    assert all(len(set(row)) == 2 for row in routing.experts.tolist())
    want = case.reference(sets)
    assert want.shape == (2, 256)
    assert case.wrong(case.xla["reference"](sets), want) is None
    assert "relative error" in case.wrong(1.1 * case.xla["reference"](sets), want)
    assert case.nbytes == round(6 * (1 - (4 / 6) ** 5) * 3 * 256 * 128) + 4 * 5 * 256


def test_a_layer_with_its_router():
    """What it computes is the layer's, of the experts that the router chooses."""
    case = LayerCase("small", 5, 256, 128, 6, 2)
    plain, routed = expert_layer.bench(case), expert_layer.routed(case)
    (x, matrix), weights = sets = routed.sets(1)[0]
    routing = router(x, matrix, None, None, k=2, scoring="sqrtsoftplus", normalize=True, scale=1.0)
    want = plain.xla["reference"](((x, routing), weights))
    assert routed.wrong(want, routed.reference(sets)) is None
    assert routed.wrong(routed.xla["reference"](sets), routed.reference(sets)) is None
    assert list(routed.ours) == [plain.usual] and routed.nbytes == plain.nbytes + 4 * 6 * 256


@pytest.mark.parametrize("formats", one_scale.FORMATS, ids=" x ".join)
def test_products_with_one_scale(formats):
    case = one_scale.bench(one_scale.OneScaleCase(8, 128, 256, *formats))
    sets = case.sets(1)[0]
    with interpreted():
        got = jax.block_until_ready(case.ours[case.usual](sets))
    want = case.reference(sets)
    assert case.wrong(got, want) is None and case.wrong(case.xla["dequantised bf16"](sets), want) is None
    assert "relative error" in case.wrong(1.1 * got, want) and case.nbytes == 128 * 256 + 8 * 256 + 2 * 8 * 128


def test_weights_of_random_bytes_look_like_quantised_ones():
    first, second = weights_of((3, 256, 512), 2, jax.random.key(0))
    for w in first, second:
        w.require_valid()
        dense = np.asarray(w.values, np.float32)
        assert np.isfinite(dense).all() and abs(dense.mean()) < 2 and 55 < dense.std() < 75
    assert (np.asarray(first.values) != np.asarray(second.values)).any()


# Runs of the command on a case that takes no time.


def fake_case(name="one", **changes):
    """y = 2 x; four tilings, of which one is wrong and one does not run."""

    def fails(x):
        raise RuntimeError("no such tiling")

    ours = {"a": lambda x: x + x, "b": lambda x: 2 * x, "wrong": lambda x: 3 * x, "fails": fails}
    choices = {
        of: Choice("few_rows", Problem(8, 64, 128), FewRows(stages=stages)) for stages, of in enumerate(ours, start=2)
    }
    case = Bench(
        "block_matmul", name, lambda key: jax.random.normal(key, (8, 64)), ours, {"xla": lambda x: x}, lambda x: 2 * x,
        nbytes=10**6, flops=10**6, choices=choices, chosen="b", shape={"m": 8},
    )  # fmt: skip
    return dataclasses.replace(case, **changes)


@pytest.fixture
def timed(monkeypatch):
    """Times are 1, 2, 3 .. microseconds in the order of the calls; returns them."""
    times = []

    def microseconds(call, sets, wait=None):
        times.append(float(len(times) + 1))
        return times[-1]

    monkeypatch.setattr(measure, "microseconds", microseconds)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(command, "benches", lambda op: [fake_case("one"), fake_case("two")])
    return times


def test_a_row_says_all(timed, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    assert command.main(["block_matmul", "--json", str(path)]) == 0
    first, second = results.read(path)
    assert (first["case"], second["case"]) == ("one", "two") and first["which"] == "b" and not first["tuning"]
    assert first["device"] == jax.devices()[0].device_kind and first["jax"] == jax.__version__ and "commit" in first
    assert first["problem"] == "m=8 n=64 k=128" and first["tiling"] == dataclasses.asdict(FewRows(stages=3))
    assert first["xla_us"] == 1.0 and first["us"] == 2.0 and first["calls"] == 64 and first["peer_us"] is None
    assert first["gbps"] == 500.0 and first["tflops"] == 0.5 and first["ratio"] is None
    assert first["share"] == pytest.approx(first["limit_us"] / 2) and first["bound"] == "bytes"
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_tuning_tries_everything_and_resumes(timed, tmp_path):
    path = tmp_path / "rows.jsonl"
    arguments = ["block_matmul", "--tune", "--json", str(path)]
    assert command.main(arguments) == 0
    whole = results.read(path)
    assert [row["which"] for row in whole] == ["a", "b", "wrong", "fails"] * 2 and len(timed) == 4
    assert whole[2]["reason"].startswith("wrong: relative error") and "no such tiling" in whole[3]["reason"]
    assert whole[2]["us"] is None and whole[2]["share"] is None and not any(row["xla"] for row in whole)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:40])  # stopped while it wrote
    assert command.main(arguments) == 0
    assert [row["which"] for row in results.read(path)] == ["a", "b", "wrong", "fails"] * 2 and len(timed) == 5
    before = path.read_text()
    assert command.main(arguments) == 0 and path.read_text() == before
    # The figures are another run, with XLA and the peer beside.
    assert command.main(["block_matmul", "--json", str(path)]) == 0
    assert [row["tuning"] for row in results.read(path)] == [True] * 8 + [False] * 2


def test_a_case_whose_inputs_failed_is_tried_again(timed, tmp_path, monkeypatch):
    def full(key):
        raise MemoryError("the device is full")

    path = tmp_path / "rows.jsonl"
    arguments = ["block_matmul", "--ours", "--json", str(path)]
    with monkeypatch.context() as patch:
        patch.setattr(command, "benches", lambda op: [fake_case("one", inputs=full)])
        command.main(arguments)
    for _ in range(2):
        command.main([*arguments, "--only", "one"])
    assert [row["reason"] for row in results.read(path)] == ["inputs: MemoryError: the device is full", None]


def test_who_was_not_beside_is_still_timed(timed, tmp_path):
    path = tmp_path / "rows.jsonl"
    command.main(["block_matmul", "--ours", "--json", str(path)])
    assert not any(row["xla"] for row in results.read(path))
    for _ in range(2):
        command.main(["block_matmul", "--json", str(path)])
    command.main(["block_matmul", "--ours", "--json", str(path)])
    assert [row["beside"] for row in results.read(path)] == [[], [], ["xla"], ["xla"]]


def test_a_peer_that_failed_is_told_and_tried_again(timed, tmp_path, monkeypatch, capsys):
    path, directory = tmp_path / "rows.jsonl", peers_in(tmp_path / "peers")
    monkeypatch.setattr(command, "benches", lambda op: [fake_case(peer=("gemm", 8, 64, 64)), fake_case("none")])
    failing, arguments = [True], ["block_matmul", "--peers", str(directory), "--json", str(path)]

    def peer(directory, kind, nbytes):
        if failing[0]:
            raise ImportError("no module named torch")
        return 7.0

    monkeypatch.setattr(peers, "time_peer", peer)
    command.main(arguments)
    assert results.read(path)[0]["peer_us"] == "ImportError: no module named torch"
    shown = [capsys.readouterr().out]
    command.main(["--markdown", str(path)])
    shown.append(capsys.readouterr().out)
    assert all(" failed " in text and "failed: ImportError: no module named torch" in text for text in shown)
    command.main(arguments[:1] + arguments[3:])  # who does not ask for it has all
    assert len(results.read(path)) == 2
    failing[0] = False
    for _ in range(2):
        command.main(arguments)
    last = results.read(path)[-1]
    assert [row["case"] for row in results.read(path)] == ["one", "none", "one"] and last["peer_us"] == 7.0
    assert last["peer_version"].startswith("DeepGEMM 2.5.0 sha256:") and results.read(path)[1]["peer_version"] is None


def test_parts_that_take_turns_make_up_the_whole(timed, tmp_path):
    """What can be is compiled beforehand; what does not compile says so where it is timed."""
    jitted = fake_case("two", ours={"a": jax.jit(lambda x: x + x), "fails": jax.jit(lambda x: x @ x)}, chosen="fails")
    lock, paths = tmp_path / "lock", [tmp_path / f"rows{i}.jsonl" for i in (1, 2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "benches", lambda op: [fake_case("one"), jitted, fake_case("three")])
        for i, path in enumerate(paths, 1):
            command.main(["block_matmul", "--part", f"{i}/2", "--lock", str(lock), "--json", str(path)])
    rows = [[(row["case"], row["us"] is None) for row in results.read(path)] for path in paths]
    assert rows == [[("one", False), ("three", False)], [("two", True)]]
    with pytest.raises(SystemExit):
        command.main(["block_matmul", "--part", "3/2"])


def test_a_turn_is_for_one_process(tmp_path):
    with turns.turn(tmp_path / "lock"), (tmp_path / "lock").open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_whole_last_line_without_its_end_is_kept(timed, tmp_path):
    path = tmp_path / "rows.jsonl"
    command.main(["block_matmul", "--json", str(path)])
    text = path.read_text()
    path.write_text(text.rstrip())
    command.main(["block_matmul", "--json", str(path)])
    assert path.read_text() == text


def test_a_kernel_that_never_ends_is_passed_over(timed, tmp_path, monkeypatch):
    path, ended = tmp_path / "rows.jsonl", threading.Event()

    class Ended(Exception):
        pass

    def wait(call, sets, wait=None):
        assert ended.wait(60)
        raise Ended

    monkeypatch.setattr(measure, "PATIENCE", 0.01)
    monkeypatch.setattr(measure, "microseconds", wait)
    monkeypatch.setattr(command.os, "_exit", lambda code: ended.set())
    command.main(["block_matmul", "--ours", "--json", str(path)])
    assert results.read(path)[0]["reason"] == "stuck for 0.01 s" and results.read(path)[0]["which"] == "b"


def test_a_lost_device_ends_the_run(timed, tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(measure, "_alive", lambda: False)
    arguments = ["block_matmul", "--tune", "--json", str(path)]
    assert command.main(arguments) == 1
    assert [row["which"] for row in results.read(path)] == ["a", "b", "wrong"]
    assert "the device is lost" in capsys.readouterr().out
    assert command.main(arguments) == 1  # the next one fails as well
    assert [row["which"] for row in results.read(path)] == ["a", "b", "wrong", "fails"]


@pytest.mark.parametrize("bad", ["{not json", "[1, 2]", "{}"])
def test_a_malformed_line_is_named(tmp_path, capsys, bad):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{bad}\n" + json.dumps({"op": "x"}) + "\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1: "):
        results.read(path)
    with pytest.raises(SystemExit):
        command.main(["--markdown", str(path)])
    assert "rows.jsonl, line 1: " in capsys.readouterr().err

"""The benchmark command without a GPU, and its judgement of results."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from pallas_kernels.bench import block_matmul
from pallas_kernels.bench.case import disagreement
from pallas_kernels.bench.timing import input_sets
from pallas_kernels.block_matmul.cases import MatmulCase


def bench(*arguments):
    command = [sys.executable, "-m", "pallas_kernels.bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


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


def test_inputs_overflow_the_cache():
    assert input_sets(16_000_000) == 16 and input_sets(10**9) == 2 and input_sets(1) == 64


@pytest.mark.parametrize("m", [1, 128])
def test_a_case_computes_what_it_says(m):
    """XLA's side against the reference, and rows that pad the problem are no part of it."""
    case = block_matmul.bench(MatmulCase("small", m, 128, 256))
    sets = jax.jit(case.inputs)(jax.random.key(0))
    want = case.reference(sets)
    assert want.shape == (m, 128) and case.flops == 2 * m * 128 * 256
    got = case.xla["dequantised bf16"](sets)[:m]
    assert disagreement(got, want) is None
    assert case.ours and case.limit > 0

"""What dsv4 exports, another implementation (Hugging Face transformers) loads, with the same logits.

These tests are marked `peer` and are skipped unless the environment variable DSV4_PEER_PYTHON names a
python interpreter that has torch, and transformers with DeepSeek-V4 (5.23.0 is the version compared with).
They run it in processes of their own, so nothing of it is installed beside jax. Two commands make it:

    python3 -m venv peer
    peer/bin/pip install torch==2.13.0 transformers==5.23.0 numpy accelerate

and one runs the tests (about eight seconds each, most of it importing torch; a CPU build is enough):

    DSV4_PEER_PYTHON=$PWD/peer/bin/python pytest -m peer tests/test_other_implementation.py

Once the variable is set, an interpreter that does not work fails the tests. What is still skipped, with its
reason: a case that tests/oracle does not hold, and a fresh model whose schedule transformers cannot
express.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TESTS = Path(__file__).resolve().parent
ORACLE = TESTS / "oracle"
SCRIPT = TESTS.parent / "experiments" / "peer_decode.py"
VARIABLE = "DSV4_PEER_PYTHON"
TOLERANCE = 2e-4  # max abs error for logits of standard deviation about 1.5; float32 rounding makes at most 2e-5
FLOAT32_CASES = ("mixed", "swa", "csa", "hca16", "hca128")

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(
        not os.environ.get(VARIABLE),
        reason=f"{VARIABLE} is not set: name a python with torch and transformers, see this file",
    ),
]


@pytest.fixture(scope="module")
def peer_python() -> str:
    """The interpreter named by DSV4_PEER_PYTHON."""
    name = os.environ[VARIABLE]
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"{VARIABLE}={name} is no executable: give the path of a python with torch and transformers")
    return os.path.abspath(found)  # not resolved: following the link would leave the virtual environment


def peer_logits(python: str, checkpoint: Path, ids: np.ndarray, scratch: Path) -> np.ndarray:
    """Logits [batch, sequence, vocabulary] that transformers computes from `checkpoint` for `ids`."""
    np.save(scratch / "ids.npy", ids)
    command = [
        python,
        "-I",
        str(SCRIPT),
        "logits",
        str(checkpoint),  # -I: no PYTHONPATH of ours in that process
        "--input-ids",
        str(scratch / "ids.npy"),
        "--output",
        str(scratch / "logits.npy"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\nexited with {done.returncode}:\n{done.stderr[-4000:]}"
    logits = np.load(scratch / "logits.npy")
    assert logits.dtype == np.float32 and logits.shape[:2] == ids.shape, (logits.dtype, logits.shape)
    return logits


def oracle(case: str) -> tuple[Path, dict[str, np.ndarray]]:
    """The recorded checkpoint directory of `case`, and its `input_ids` and `logits`."""
    checkpoint, data = ORACLE / "ckpt" / case, ORACLE / "data" / f"{case}__main.npz"
    if case != "mixed" and not (checkpoint.is_dir() and data.is_file()):
        pytest.skip(f"tests/oracle holds no case {case}")
    with np.load(data) as arrays:
        return checkpoint, {name: arrays[name] for name in ("input_ids", "logits")}


def check_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Within the tolerance everywhere, and the same arg-max at every position."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    error = float(np.abs(ours - theirs).max())
    assert error <= TOLERANCE, f"logits differ by {error:.2e}, more than {TOLERANCE:.0e}"
    differ = np.argwhere(ours.argmax(-1) != theirs.argmax(-1))
    assert not len(differ), f"arg-max differs at (row, position) {differ[:8].tolist()}"


def our_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """Float32 logits [batch, sequence, vocabulary] of a dsv4 model."""
    import dsv4

    logits = np.asarray(dsv4.forward(model, ids.astype(np.int32)))
    assert logits.dtype == np.float32, logits.dtype
    return logits


@pytest.mark.parametrize("case", (*FLOAT32_CASES, "mixed_fp8fp4"))
def test_peer_agrees_with_the_recorded_numbers(case: str, peer_python: str, tmp_path: Path) -> None:
    """The interpreter at hand computes what was recorded, or the tests below would compare with nothing."""
    checkpoint, data = oracle(case)
    check_same(peer_logits(peer_python, checkpoint, data["input_ids"], tmp_path), data["logits"])


@pytest.mark.parametrize("case", FLOAT32_CASES)
def test_exported_checkpoint_gives_our_logits_in_the_peer(case: str, peer_python: str, tmp_path: Path) -> None:
    """Load, export, load the export in transformers: the same logits."""
    import dsv4
    from dsv4.checkpoint import export

    checkpoint, data = oracle(case)
    model = dsv4.load(checkpoint)
    exported = tmp_path / "exported"
    export(model, exported)
    check_same(our_logits(model, data["input_ids"]), peer_logits(peer_python, exported, data["input_ids"], tmp_path))


def test_exported_fresh_model_gives_our_logits_in_the_peer(peer_python: str, tmp_path: Path) -> None:
    """A model that never was a checkpoint: our config.json alone must tell transformers everything.

    Its tokens are random, so two logits may tie. The arg-max has to agree wherever the largest logit leads by
    more than both errors together, which must be nearly everywhere.
    """
    import dsv4
    from dsv4.checkpoint import export

    model = dsv4.init("tiny", seed=1)  # fresh weights can tie index scores at 0, and ties break differently there
    exported = tmp_path / "exported"
    export(model, exported)
    config = json.loads((exported / "config.json").read_text())
    ratios = set(config["compress_ratios"][: config["num_hidden_layers"]]) - {0, 4}
    if len(ratios) > 1:
        pytest.skip(f"tiny has several compression rates {sorted(ratios)}: transformers knows one beside 4")

    length = min(160, config["max_position_embeddings"])  # long enough for an entry of every rate up to 128
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (2, length), dtype=np.int32)
    ours, theirs = our_logits(model, ids), peer_logits(peer_python, exported, ids, tmp_path)
    spread = float(theirs.std())
    assert spread > 1e-3, f"logits of standard deviation {spread:.1e} compare nothing: initialise the model"
    tolerance = TOLERANCE * min(1.0, spread)
    error = float(np.abs(ours - theirs).max())
    assert error <= tolerance, f"logits differ by {error:.2e}, more than {tolerance:.1e}"
    top = np.sort(theirs, axis=-1)
    clear = top[..., -1] - top[..., -2] > 2 * tolerance
    assert clear.mean() > 0.9, f"only {clear.mean():.0%} of the positions have a clear arg-max"
    assert (ours.argmax(-1) == theirs.argmax(-1))[clear].all()

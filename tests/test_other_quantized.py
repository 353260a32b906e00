"""A quantised export, loaded by another implementation (Hugging Face transformers), gives the same logits.

Marked `peer`: tests/test_other_implementation.py says what that needs and how to make it. One command runs these:

    DSV4_PEER_PYTHON=$PWD/peer/bin/python pytest -m peer tests/test_other_quantized.py

On a CPU transformers dequantises the weights and rounds nothing else, so that it is compared with our float32
arithmetic on the dequantised weights.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "experiments" / "peer_decode.py"
VARIABLE = "DSV4_PEER_PYTHON"
TOLERANCE = 2e-4  # of logits with a standard deviation of about 1; float32 rounding makes at most 2e-5

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(
        not os.environ.get(VARIABLE),
        reason=f"{VARIABLE} is not set: see tests/test_other_implementation.py",
    ),
]


def peer_logits(checkpoint: Path, ids: np.ndarray, scratch: Path) -> np.ndarray:
    """Logits [batch, sequence, vocabulary] that transformers computes from `checkpoint` for `ids`."""
    name = os.environ[VARIABLE]
    found = shutil.which(name)
    assert found, f"{VARIABLE}={name} is no executable"
    np.save(scratch / "ids.npy", ids)
    files = ["--input-ids", str(scratch / "ids.npy"), "--output", str(scratch / "logits.npy")]
    command = [os.path.abspath(found), "-I", str(SCRIPT), "logits", str(checkpoint), *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\nexited with {done.returncode}:\n{done.stderr[-4000:]}"
    return np.load(scratch / "logits.npy")


@pytest.mark.parametrize("name", ["released", "fp8"])
def test_a_quantised_export_gives_our_logits_in_the_peer(name: str, tmp_path: Path) -> None:
    import dsv4
    from dsv4.checkpoint import export
    from dsv4.config import RECIPES, Execution, load_config, replace
    from dsv4.quantize.convert import quantize_checkpoint

    config = replace(load_config("tiny").model, "moe.expert_width", 32)  # MXFP4 groups of 32
    export(dsv4.init(config, seed=2), tmp_path / "plain")  # with seed 1, index scores tie at 0
    report = quantize_checkpoint(tmp_path / "plain", tmp_path / "quantised", RECIPES[name])
    assert report.layout == "released" and report.awkward == ()

    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 160), dtype=np.int32)
    model = dsv4.load(tmp_path / "quantised", execution=Execution())
    ours = np.asarray(dsv4.forward(model, ids))
    theirs = peer_logits(tmp_path / "quantised", ids, tmp_path)
    plain = np.asarray(dsv4.forward(dsv4.load(tmp_path / "plain"), ids))

    error, moved, spread = (float(np.abs(x).max()) for x in (ours - theirs, ours - plain, ours.std()))
    print(
        f"{name}: max abs error {error:.2e}, quantisation moved logits by up to {moved:.2e}, their std is {spread:.2f}"
    )
    assert error <= TOLERANCE * min(1.0, spread)
    assert moved > 100 * TOLERANCE, "the quantised weights are hardly different: this compares nothing"
    top = np.sort(theirs, axis=-1)
    clear = top[..., -1] - top[..., -2] > 2 * TOLERANCE
    assert clear.mean() > 0.9 and (ours.argmax(-1) == theirs.argmax(-1))[clear].all()


@pytest.mark.parametrize(("rank", "wrong"), [(160, True), (256, False)])
def test_the_shapes_that_we_warn_of_are_wrong_there(rank: int, wrong: bool, tmp_path: Path) -> None:
    """If 160 comes out right one day, the warning of `dsv4 quantize` can go."""
    import dsv4
    from dsv4.checkpoint import export
    from dsv4.config import RECIPES, Execution, load_config, replace
    from dsv4.quantize.convert import quantize_checkpoint

    model = dsv4.init(replace(load_config("tiny").model, "attention.q_lora_rank", rank), seed=2)
    for layer in model.params["layers"].values():  # blocks of rows whose scales differ
        layer["attn"]["wq_a"]["weight"] = layer["attn"]["wq_a"]["weight"].at[128:].multiply(8)
    export(model, tmp_path / "plain")
    report = quantize_checkpoint(tmp_path / "plain", tmp_path / "quantised", RECIPES["fp8"])
    assert bool(report.awkward) == wrong
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 96), dtype=np.int32)
    ours = np.asarray(dsv4.forward(dsv4.load(tmp_path / "quantised", execution=Execution()), ids))
    error = float(np.abs(ours - peer_logits(tmp_path / "quantised", ids, tmp_path)).max())
    assert (error > 0.1) if wrong else (error <= TOLERANCE), error

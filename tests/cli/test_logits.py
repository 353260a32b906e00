"""`dsv4 logits`: the recorded logits by every path, and inputs that cannot be run."""

import json

import numpy as np
import pytest

TOLERANCE = 2e-4  # of the recorded float32 logits, see tests/oracle/README.md


@pytest.fixture(scope="module")
def recorded(oracle):
    return np.load(oracle / "data" / "mixed_fp8fp4__main.npz")


@pytest.fixture
def ids(tmp_path, recorded):
    path = tmp_path / "ids.npy"
    np.save(path, recorded["input_ids"])
    return path


MODES = [["full"], ["decode"], ["chunked", "--chunk", "64"]]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode[0])
def test_every_mode_gives_the_recorded_logits(dsv4, released, ids, recorded, tmp_path, mode):
    path, facts = tmp_path / "logits.npy", tmp_path / "facts.json"
    result = dsv4("logits", released, "--input-ids", ids, "--output", path, "--json", facts, "--mode", *mode)
    assert result.code == 0 and result.out == f"{path}: float32 [1, 150, 256]\n"
    found = np.load(path)
    assert found.dtype == np.float32 and found.shape == recorded["logits"].shape
    assert np.abs(found - recorded["logits"]).max() < TOLERANCE
    written = json.loads(facts.read_text())
    assert (written["output"], written["mode"], written["shape"]) == (str(path), mode[0], [1, 150, 256])
    assert written["tokens_per_second"] * written["seconds"] == pytest.approx(150)


def test_as_stored_rounds_activations_and_cache(dsv4, released, ids, recorded, tmp_path):
    path = tmp_path / "logits.npy"
    assert dsv4("logits", released, "--input-ids", ids, "--output", path, "--as-stored").code == 0
    error = np.abs(np.load(path) - recorded["logits"])
    assert 10 * TOLERANCE < error.max() and error.mean() < 0.2 * recorded["logits"].std()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((1, 0), np.int32), "an empty prompt"),
        (np.zeros(3, np.int32), "[batch, tokens] is needed"),
        (np.zeros((1, 3), np.float32), "integers are needed"),
        (np.array([[1, 256]]), "token id 256 is out of range: the vocabulary has ids 0..255"),
        (np.array([[-1]]), "token id -1 is out of range"),
    ],
)
def test_ids_that_cannot_be_run(fails, released, tmp_path, content, message):
    np.save(tmp_path / "ids.npy", content)
    output = tmp_path / "logits.npy"
    assert message in fails("logits", released, "--input-ids", tmp_path / "ids.npy", "--output", output)
    assert not output.exists()


def test_a_sequence_longer_than_the_context(fails, edited, ids, tmp_path):
    directory = edited(max_position_embeddings=100)
    message = fails("logits", directory, "--input-ids", ids, "--output", tmp_path / "logits.npy")
    assert "150 tokens do not fit" in message


@pytest.mark.parametrize("content", [b"", b"not an array", b"\x93NUMPY"])
def test_a_file_that_is_no_array(fails, released, tmp_path, content):
    (tmp_path / "ids.npy").write_bytes(content)
    message = fails("logits", released, "--input-ids", tmp_path / "ids.npy", "--output", tmp_path / "x.npy")
    assert "is not an .npy array" in message


def test_an_unwritable_output_is_found_first(fails, released, ids, tmp_path, monkeypatch):
    monkeypatch.setattr("dsv4.cli.logits.load_model", lambda *_: pytest.fail("the model was loaded"))
    for output in (tmp_path / "missing" / "logits.npy", tmp_path):
        assert "cannot write" in fails("logits", released, "--input-ids", ids, "--output", output)


def test_options_out_of_range_are_2(fails, released, ids, tmp_path):
    command = ["logits", released, "--input-ids", ids, "--output", tmp_path / "x.npy"]
    assert "--chunk is 0" in fails(*command, "--mode", "chunked", "--chunk", "0", code=2)


def test_a_missing_checkpoint(fails, ids, tmp_path):
    assert "nowhere" in fails("logits", "nowhere", "--input-ids", ids, "--output", tmp_path / "x.npy")

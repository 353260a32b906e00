"""`dsv4 import` and `dsv4 export`: there and back, bit for bit."""

import json

import safetensors

from dsv4.config import read_released


def tensors(directory):
    found = safetensors.deserialize((directory / "model.safetensors").read_bytes())
    return {name: (tensor["dtype"], tensor["shape"], bytes(tensor["data"])) for name, tensor in found}


def test_there_and_back(dsv4, released, tmp_path):
    orbax, back = tmp_path / "orbax", tmp_path / "back"
    imported = dsv4("import", released, orbax, "--json", tmp_path / "import.json")
    assert imported.code == 0 and "parameters" in imported.out and "loading" in imported.err
    exported = dsv4("export", orbax, back)
    assert exported.code == 0, exported.err
    assert tensors(back) == tensors(released)
    assert (back / "tokenizer.json").read_bytes() == (released / "tokenizer.json").read_bytes()
    assert read_released(back) == read_released(released)
    facts = json.loads((tmp_path / "import.json").read_text())
    assert facts["destination"] == str(orbax) and facts["bytes"] > 0
    assert "3: window, csa:4, hca:128" in dsv4("info", orbax).out
    assert "is an orbax checkpoint" in dsv4("import", orbax, tmp_path / "again").err


def test_a_destination_in_use_is_refused(dsv4, released, tmp_path):
    (tmp_path / "file").write_text("mine")
    result = dsv4("import", released, tmp_path)
    assert result.code == 1 and result.err.splitlines()[-1].startswith("dsv4: error: ")
    assert (tmp_path / "file").read_text() == "mine"


def test_another_architecture_and_a_later_release(dsv4, edited, tmp_path):
    directory = edited(model_type="llama")
    result = dsv4("import", directory, tmp_path / "orbax")
    assert result.code == 1 and "model_type is 'llama'" in result.err
    later = {"model_type": "deepseek_v4", "compress_ratios": [0, 4, 128, 0, 0, 0]}
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | later))
    result = dsv4("import", directory, tmp_path / "orbax")
    assert result.code == 1 and "dspark" in result.err

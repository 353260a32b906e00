"""Where a config comes from: a name, a Python file, a config.json; and what is said when it is none of them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dsv4.config import ConfigError, TrainConfig, load_config, names, read_released

CKPT = Path(__file__).parents[1] / "oracle" / "ckpt"
SCHEDULES = {"flash": (43, 2, 21, 20), "pro": (61, 0, 30, 31)}  # layers, window, CSA, HCA


def test_there_are_names():
    assert names() == sorted(names()) and {"flash", "pro", "small", "small_dense", "tiny"} <= set(names())


@pytest.mark.parametrize("name", names())
def test_a_named_config_loads(name):
    config = load_config(name)
    assert config.name == name
    assert config == load_config(name) == load_config(Path(__file__).parents[2] / "configs" / f"{name}.py")


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_released_schedules(name):
    layers = load_config(name).model.layers
    kinds = [layer.kind for layer in layers]
    assert (len(layers), *(kinds.count(kind) for kind in ("window", "csa", "hca"))) == SCHEDULES[name]
    assert {layer.ratio for layer in layers} <= {0, 4, 128} and kinds[2:4] == ["csa", "hca"] and kinds[-1] == "csa"


def test_a_file_and_its_directory_are_the_same_model(tmp_path):
    shutil.copytree(CKPT / "swa", tmp_path / "mine", ignore=shutil.ignore_patterns("*.safetensors"))
    by_folder, by_file = load_config(tmp_path / "mine"), load_config(str(tmp_path / "mine" / "config.json"))
    assert by_folder.model == by_file.model == read_released(CKPT / "swa")
    assert by_folder.name == "mine" and by_folder.train == TrainConfig()


@pytest.mark.parametrize(("source", "near"), [("flsh", "flash"), ("tin", "tiny"), ("small-dense", "small_dense")])
def test_an_unknown_name_suggests_the_nearest(source, near):
    with pytest.raises(ConfigError) as caught:
        load_config(source)
    assert f"no config {source!r}: did you mean {near!r}? named configs are {', '.join(names())}" in str(caught.value)


@pytest.mark.parametrize("source", ["zzzzzz", "../tiny", "nowhere.py"])
def test_an_unknown_name_lists_what_there_is(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="named configs are .*; or give a Python file that defines MODEL"):
        load_config(source)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import no_such_module_here", "ModuleNotFoundError"),
        ("MODEL = (", "SyntaxError"),
        ("from dsv4.config import *\nMODEL = MoEConfig(per_token=0)", "moe.per_token is 0"),
        ("from dsv4.config.layers import parse_layers\nparse_layers('csa')", "layers: cannot read 'csa'"),
        ("", "define MODEL = ModelConfig"),
        ("MODEL = 3", "define MODEL = ModelConfig"),
        ("from dsv4.config import load_config\nMODEL = load_config('tiny').model\nTRAIN = 3", "define MODEL"),
    ],
)
def test_a_config_file_that_fails_is_named(text, message, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_a_config_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from dsv4.config import TrainConfig, load_config, replace\n"
        "MODEL = replace(load_config('tiny').model, 'width', 64)\nTRAIN = TrainConfig(steps=3)\n"
    )
    config = load_config(path)
    assert (config.name, config.model.width, config.train.steps) == ("mine", 64, 3)


def test_a_directory_without_a_config_is_named(tmp_path):
    with pytest.raises(ConfigError, match="config.json does not exist"):
        load_config(tmp_path)


def test_the_package_does_not_import_jax():
    code = "import sys, dsv4.config as c; [c.load_config(n) for n in c.names()]; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

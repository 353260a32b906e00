"""The grammar: help, exit codes, errors in one line, overrides, atomic output."""

import json
import os
import subprocess
import sys
import warnings

import pytest

from dsv4.cli import compilation, output
from dsv4.cli.app import COMMANDS, UsageError, one_line
from dsv4.config import ConfigError


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(dsv4, command):
    result = dsv4(command, "--help")
    assert result.code == 0 and f"  dsv4 {command}" in result.out and result.err == ""


def test_help_names_every_command(dsv4):
    result = dsv4("--help")
    assert result.code == 0 and all(f"• {command}" in result.out for command in COMMANDS)
    assert dsv4("--version").out == "0.1.0\n"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["frobnicate"],
        ["info"],
        ["info", "tiny", "--frobnicate"],
        ["info", "tiny", "--set", "model.width"],
        ["info", "tiny", "--set", "=3"],
        ["logits", "x", "--input-ids", "a.npy", "--output", "b.npy", "--mode", "sideways"],
        ["generate", "text", "--top-k", "many"],
    ],
)
def test_what_cannot_be_parsed_is_2(dsv4, argv):
    result = dsv4(*argv)
    assert result.code == 2 and result.out == "" and result.err


def test_a_malformed_override_says_how_to_write_it(dsv4):
    assert "is not of the form FIELD=VALUE" in dsv4("info", "tiny", "--set", "model.width").err


def test_help_tells_exit_codes_apart(dsv4):
    assert "exit code" in (text := dsv4("--help").out) and "2 for what stands on the command line" in text


def test_an_unknown_config_names_the_known_ones(fails):
    message = fails("info", "flsh", code=2)
    assert "no config 'flsh'" in message and "did you mean 'flash'?" in message and "tiny" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.widht=3", "did you mean 'width'?"),
        ("model.width=wide", "width is 'wide': expected int"),
        ("model.moe.experts=1", "moe.per_token is 2: it must be between 1 and moe.experts 1"),
        ("width=3", "write model.width=3"),
    ],
)
def test_an_override_of_no_field_or_value_is_2(fails, override, message):
    assert message in fails("info", "tiny", "--set", override, code=2)


def test_another_architecture_is_named(fails, edited):
    assert "model_type is 'llama'" in fails("info", edited(model_type="llama"))


def test_a_later_release_is_named(fails, edited):
    assert "dspark" in fails("info", edited(compress_ratios=[0, 4, 128, 0, 0, 0]))


def test_a_directory_without_a_config_is_1(fails, tmp_path):
    assert "does not exist" in fails("info", tmp_path)


@pytest.mark.parametrize("where", ["missing/out.json", "."])
def test_an_unwritable_json_is_1(fails, tmp_path, where):
    assert "cannot write" in fails("info", "tiny", "--json", tmp_path / where)
    assert os.listdir(tmp_path) == []


def test_debug_shows_the_traceback(dsv4, monkeypatch, tmp_path):
    monkeypatch.setenv("DSV4_DEBUG", "1")
    with pytest.raises(UsageError, match="no config"):
        dsv4("info", "nope")
    with pytest.raises(ConfigError, match="does not exist"):
        dsv4("info", tmp_path)


def test_warnings_come_in_one_line(dsv4, edited):
    directory = edited(frobnicate=3)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = dsv4("info", directory)
    assert result.code == 0
    assert result.err == "dsv4: warning: config.json keys not known to dsv4, ignored: frobnicate\n"


def test_a_list_of_problems_becomes_one_line():
    assert one_line("cannot read x\n  missing (2):\n    a\n    b\n") == "cannot read x; missing (2): a; b"


def test_output_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), output.json_file(path) as write:
        write({"a": 1})
        raise RuntimeError
    assert path.read_text() == "old"
    with output.json_file(path) as write:
        write({"a": 1})
        assert path.read_text() == "old"
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["out.json"]


def test_numbers_are_short():
    assert [output.count(n) for n in (7, 81_900, 284.3e9, 1.573e12)] == ["7", "81.9 k", "284 B", "1.57 T"]
    assert [output.size(n) for n in (9216, 2.1e6, 159.6e9)] == ["9,216 B", "2.1 MB", "160 GB"]


def test_the_compilation_cache_can_be_placed_and_turned_off(monkeypatch, tmp_path):
    monkeypatch.setenv(compilation.VARIABLE, str(tmp_path))
    assert compilation.cache_directory() == tmp_path
    monkeypatch.setenv(compilation.VARIABLE, "off")
    assert compilation.cache_directory() is None
    monkeypatch.delenv(compilation.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compilation.cache_directory() == tmp_path / "dsv4" / "xla"


def test_a_closed_pipe_is_no_traceback():
    command = f"{sys.executable} -m dsv4.cli info flash | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""

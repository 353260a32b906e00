"""A command line in process, and a checkpoint with a tokenizer."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from dsv4.cli import main


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    """A command must not change jax's settings under the tests that follow."""
    monkeypatch.setenv("DSV4_COMPILATION_CACHE", "off")


@pytest.fixture
def dsv4(capsys):
    """Runs a command line: dsv4("info", "tiny") -> exit code, stdout, stderr."""

    def run(*argv):
        capsys.readouterr()
        code = main([str(word) for word in argv])
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def fails(dsv4):
    """Runs a command line that must fail with one line on stderr, and returns that line."""

    def run(*argv, code=1):
        result = dsv4(*argv)
        assert result.code == code, result
        assert result.out == "" and result.err.startswith("dsv4: error: ") and result.err.count("\n") == 1
        return result.err

    return run


@pytest.fixture(scope="session")
def released(oracle, tmp_path_factory):
    """A small released checkpoint (quantised, 256 ids) with a tokenizer of bytes beside it."""
    directory = tmp_path_factory.mktemp("released") / "model"
    shutil.copytree(oracle / "ckpt" / "mixed_fp8fp4", directory)
    # Two special ids and 254 bytes; no text holds the other two.
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"þ", "ÿ"})
    vocabulary = {token: i for i, token in enumerate(["<|begin|>", "<|end|>", *letters])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture
def edited(released, tmp_path):
    """Makes a directory whose config.json is that of `released` with keys changed."""

    def edit(**changes):
        raw = json.loads((released / "config.json").read_text())
        directory = Path(tmp_path / "edited")
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(raw | changes))
        return directory

    return edit

"""Windows of a model's own tokens."""

import dataclasses

import numpy as np
import pytest

from dsv4.api import SHIPPED
from dsv4.config import load_config
from dsv4.decoding.inputs import InputError
from dsv4.decoding.text import load_tokenizer
from dsv4.evaluate.text import documents, model_windows, spread, token_bytes
from dsv4.model.handle import Model
from dsv4.training.errors import DataError
from dsv4.training.tokenizer import token_bytes as trained_token_bytes

TEXT = "Naïve 漢字, in the beginning.\n\n" * 40


@pytest.fixture(scope="module")
def model():
    """The shipped tokenizer without the weights."""
    return Model(load_config("small").model, {}, tokenizer_path=str(SHIPPED / "small" / "tokenizer.json"))


def test_every_byte_of_the_text_is_scored_once(model):
    windows = model_windows(model, [TEXT, TEXT], 100, 10**6)
    assert windows.text_bytes.sum() == 2 * len(TEXT.encode())
    assert windows.tokens.shape[1] == 101 and windows.tokens[0, 0] == 0


def test_bytes_are_those_of_training(model):
    tokenizer = load_tokenizer(model)
    np.testing.assert_array_equal(token_bytes(tokenizer, 2048), trained_token_bytes(tokenizer))
    assert token_bytes(tokenizer, 3000)[2048:].sum() == 0


def test_windows_are_spread_over_the_text(model):
    windows = model_windows(model, [TEXT] * 9, 100, 10**6)
    some = spread(windows, 4)
    assert len(some) == 4
    np.testing.assert_array_equal(some.tokens[[0, -1]], windows.tokens[[0, -1]])
    assert len(spread(windows, 10**6)) == len(windows) and len(spread(windows, 1)) == 1


def test_text_that_will_not_do(model, tmp_path):
    with pytest.raises(DataError, match=r"the text has \d+ tokens, one window of 2000 needs 2001"):
        model_windows(model, ["Short."], 2000, 4)
    with pytest.raises(InputError, match="2048"):
        model_windows(model, [TEXT], 4096, 4)
    with pytest.raises(InputError, match="no tokenizer"):
        model_windows(model.replace(tokenizer_path=None), [TEXT], 100, 4)
    with pytest.raises(DataError, match="begin id is 5"):
        model_windows(model.replace(config=dataclasses.replace(model.config, bos_id=5)), [TEXT], 100, 4)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="not UTF-8 at byte 3"):
        documents(str(tmp_path / "latin.txt"))


def test_held_out_is_the_corpus(monkeypatch):
    monkeypatch.setattr("dsv4.evaluate.text.load_corpus", lambda: [])
    assert documents("held_out") == []

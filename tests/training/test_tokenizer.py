"""The tokenizer: round trips, determinism, ids by paragraph, files and their errors."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from dsv4.training.errors import DataError
from dsv4.training.tokenizer import (
    BOS,
    BOS_ID,
    EOS,
    EOS_ID,
    bytes_per_token,
    decode,
    encode,
    load_tokenizer,
    paragraphs,
    replacing,
    save_tokenizer,
    token_bytes,
    train_tokenizer,
)

TEXT = (
    "ACT I\n\nKING JOHN:\nNow, say, Chatillon, what would France with us?\n\n[Exit]\n\n"
    "CHATILLON:\nThus, after greeting, speaks the King of France\nIn my behavior to the majesty.\n\n"
) * 3
AWKWARD = [
    "",
    "\n",
    " ",
    "\n\n\n  x\n\n y\n\n\n\nz",
    "tabs\tand\r\nreturns\r\r\n\n",
    "1234 + 5.6e-7 = ?",
    "naïve Ænon — “quotes” 日本語 🙂🏽 \u200d e\u0301",
    "\x00\x1c\x1f\x85\xa0\u2028\n\n\x1c\n\n\x85x",
    f"spelled out: {BOS}{EOS} <|begin|",
    "   indented\n\n    code()\n",
]
# Text out of what the pattern and the paragraph cut look at, with much white space.
nasty_text = st.text(st.sampled_from(" \n\n\n\r\t\x1c\x85\u3000aZé7.,'\"[-—🙂"), max_size=60)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT], 300)


@pytest.fixture(scope="module")
def blank_tokenizer() -> Tokenizer:
    """One with merges of line ends and spaces: a cut inside a run of them would change its ids."""
    return train_tokenizer([TEXT + "a.\n\n\n   Z,\n\n  \n\n \n\na\r\n\r\n\r\n\n\n" * 40], 330)


@pytest.mark.parametrize("text", AWKWARD)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str):
    ids = encode(tokenizer, text)
    assert ids.dtype == np.uint16
    assert decode(tokenizer, ids) == text
    assert not np.isin(ids, [BOS_ID, EOS_ID]).any()
    assert token_bytes(tokenizer)[ids].sum() == len(text.encode())


@example(text="a\n\n\nZ")
@example(text="a.\n\n\n   Z,\n\n  \n\n \n\na\r\n\r\n\r\n\n\n")
@given(text=st.one_of(nasty_text, st.text(st.characters(exclude_categories=["Cs"]), max_size=60)))
def test_paragraphs_give_the_ids_of_the_whole(blank_tokenizer: Tokenizer, text: str):
    assert "".join(paragraphs(text)) == text
    assert encode(blank_tokenizer, text).tolist() == blank_tokenizer.encode(text, add_special_tokens=False).ids
    assert decode(blank_tokenizer, encode(blank_tokenizer, text)) == text


def test_training_is_deterministic_and_of_the_size_asked(tokenizer: Tokenizer):
    again = train_tokenizer([TEXT], 300)
    assert again.to_str() == tokenizer.to_str()
    assert again.get_vocab_size() == 300


def test_ids_are_special_then_bytes_then_merges(tokenizer: Tokenizer):
    assert (tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)) == (BOS_ID, EOS_ID) == (0, 1)
    lengths = token_bytes(tokenizer)
    assert lengths[:2].tolist() == [0, 0]
    assert (lengths[2:258] == 1).all() and (lengths[258:] > 1).all()
    assert decode(tokenizer, [BOS_ID, *encode(tokenizer, "Exit"), EOS_ID]) == "<|begin|>Exit<|end|>"


def test_digits_stay_single(tokenizer: Tokenizer):
    assert len(encode(train_tokenizer(["1234 1234 " * 50 + TEXT], 300), "1234")) == 4


def test_merges_shorten_text(tokenizer: Tokenizer):
    assert bytes_per_token(train_tokenizer([TEXT], 258), [TEXT]) == 1
    assert bytes_per_token(tokenizer, [TEXT]) > 1.5


def test_a_saved_tokenizer_loads_the_same(tokenizer: Tokenizer, tmp_path: Path):
    path = tmp_path / "new" / "tokenizer.json"
    save_tokenizer(tokenizer, path)
    loaded = load_tokenizer(path)
    assert loaded.to_str() == tokenizer.to_str()
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]
    assert encode(loaded, AWKWARD[-2]).tolist() == encode(tokenizer, AWKWARD[-2]).tolist()


def test_sizes_and_files_that_cannot_work_say_so(tmp_path: Path):
    with pytest.raises(DataError, match="cannot make 257 ids; choose from 258"):
        train_tokenizer([TEXT], 257)
    with pytest.raises(DataError, match=r"merges for \d+ ids, not 60000"):
        train_tokenizer([TEXT], 60_000)
    with pytest.raises(FileNotFoundError, match="no tokenizer at .*absent.json; make one"):
        load_tokenizer(tmp_path / "absent.json")
    Tokenizer(models.BPE()).save(str(tmp_path / "other.json"))
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(DataError, match=r"no.json is not a tokenizer"):
        load_tokenizer(tmp_path / "no.json")
    with pytest.raises(DataError, match=r"other.json: .* have ids \(None, None\) among 0"):
        load_tokenizer(tmp_path / "other.json")


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_text() == "old"

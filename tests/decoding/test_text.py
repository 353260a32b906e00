"""Ids to text, a token at a time."""

import pytest

from dsv4.decoding.text import TextDecoder, encode, stream_text
from dsv4.training.tokenizer import train_tokenizer

TEXT = "naïve café, 東京 🦜🏽 end"


@pytest.fixture(scope="module")
def tokenizer():
    """Two special ids and 256 bytes, so that every character beyond ASCII spans tokens."""
    return train_tokenizer([""], 258)


def test_text_comes_back_and_characters_come_whole(tokenizer):
    decoder = TextDecoder(tokenizer)
    ids = encode(tokenizer, TEXT)
    pieces = [decoder.feed(token) for token in ids]
    assert "".join(pieces) == TEXT and decoder.finish() == ""
    assert len(ids) == len(TEXT.encode()) and [piece for piece in pieces if piece] == list(TEXT)


def test_every_byte_is_spelled_as_the_tokenizer_spells_it(tokenizer):
    text = "".join(map(chr, range(0x250)))
    assert "".join(stream_text(TextDecoder(tokenizer), iter(encode(tokenizer, text)))) == text


def test_an_unfinished_character_shows_at_the_end(tokenizer):
    ids = encode(tokenizer, "a🦜")[:-1]
    assert list(stream_text(TextDecoder(tokenizer), iter(ids))) == ["a", "\ufffd"]


def test_an_impossible_byte_does_not_block_the_rest(tokenizer):
    lead, ascii_letter = encode(tokenizer, "é")[0], encode(tokenizer, "z")[0]
    assert "".join(stream_text(TextDecoder(tokenizer), iter([lead, ascii_letter]))) == "\ufffdz"


def test_special_ids_have_no_text_and_cannot_be_spelled(tokenizer):
    assert "".join(stream_text(TextDecoder(tokenizer), iter([0, *encode(tokenizer, "a"), 1]))) == "a"
    assert 0 not in encode(tokenizer, "<|begin|>")


def test_ids_the_tokenizer_lacks_show_as_unknown(tokenizer):
    assert TextDecoder(tokenizer).feed(9999) == "\ufffd"

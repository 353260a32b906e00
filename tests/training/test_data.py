"""Batches and evaluation windows: seekable, exact, each byte counted once."""

import math
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from dsv4.training.data import Batches, bits_per_byte, eval_windows, text_files, tokenise
from dsv4.training.errors import DataError
from dsv4.training.tokenizer import BOS_ID, decode, token_bytes, train_tokenizer

DOCUMENTS = [
    "The first document: Ænon.\n\nIt has two paragraphs.\n",
    "The second — shorter.\n",
    "Third <|begin|>.\n",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(DOCUMENTS, 270)


@pytest.fixture(scope="module")
def tokens(tokenizer: Tokenizer) -> np.ndarray:
    return tokenise(DOCUMENTS, tokenizer)


def test_each_document_starts_with_bos(tokenizer: Tokenizer, tokens: np.ndarray):
    starts = np.flatnonzero(tokens == BOS_ID)
    assert tokens.dtype == np.uint16 and len(starts) == 3
    assert [decode(tokenizer, part[1:]) for part in np.split(tokens, starts[1:])] == DOCUMENTS
    assert tokenise([], tokenizer).shape == (0,)


def test_text_files_read_or_say_why_not(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("Zoë\r\nend".encode())
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "latin.txt").write_bytes(b"Zo\xeb")
    (tmp_path / "empty.txt").touch()
    assert text_files([tmp_path / "b.txt", str(tmp_path / "a.txt")]) == ["b", "Zoë\nend"]
    with pytest.raises(FileNotFoundError, match="no text file at .*absent"):
        text_files([tmp_path / "absent"])
    with pytest.raises(DataError, match=r"latin.txt is not UTF-8 at byte 2"):
        text_files([tmp_path / "latin.txt"])
    with pytest.raises(DataError, match=r"empty.txt is empty"):
        text_files([tmp_path / "empty.txt"])
    with pytest.raises(DataError, match="no text files given"):
        text_files([])


def test_a_batch_depends_on_seed_and_step_alone():
    stream = np.arange(1000, dtype=np.uint16)
    batches = Batches(stream, batch=4, length=7, seed=3)
    batch = batches.batch_at(5)
    assert batch.shape == (4, 8) and batch.dtype == np.int32
    np.testing.assert_array_equal(batch, batch[:, :1] + np.arange(8))
    np.testing.assert_array_equal(Batches(stream, 4, 7, 3).batch_at(5), batch)
    assert not np.array_equal(batches.batch_at(6), batch)
    assert not np.array_equal(Batches(stream, 4, 7, 4).batch_at(5), batch)


def test_offsets_never_change():
    # Written down once: a checkpoint resumed after an upgrade of NumPy must see the same data.
    offsets = Batches(np.zeros(1_000_000, np.uint16), batch=4, length=512, seed=1).offsets_at(12345)
    assert offsets.tolist() == [791684, 468921, 776506, 69710]


def test_offsets_reach_both_ends_and_nothing_beyond():
    batches = Batches(np.zeros(20, np.uint16), batch=400, length=15, seed=0)
    assert set(batches.offsets_at(0).tolist()) == {0, 1, 2, 3, 4}
    assert Batches(np.zeros(16, np.uint16), 2, 15, 0).batch_at(9).shape == (2, 16)


def test_batches_that_cannot_be_made_say_so():
    stream = np.zeros(10, np.uint16)
    with pytest.raises(DataError, match=r"shape \(10,\) hold no sequence of 10 \+ 1 ids"):
        Batches(stream, 1, 10, 0)
    with pytest.raises(DataError, match="got batch=0, length=3, seed=-1"):
        Batches(stream, 0, 3, -1)
    with pytest.raises(DataError, match="step -1 is negative"):
        Batches(stream, 1, 3, 0).batch_at(-1)


@pytest.mark.parametrize(("length", "stride"), [(8, 8), (8, 4), (8, 3), (8, 1), (1, 1), (500, 100), (40, 39)])
def test_each_id_of_text_is_scored_once_with_its_context(
    tokenizer: Tokenizer, tokens: np.ndarray, length: int, stride: int
):
    # Where each place in each window comes from: cut a stream of positions in the same way.
    positions = eval_windows(np.arange(1, len(tokens) + 1), length, stride, np.zeros(len(tokens) + 1, np.int64))
    windows = eval_windows(tokens, length, stride, token_bytes(tokenizer))
    targets = positions.tokens[:, 1:][windows.scored] - 1
    assert sorted(targets.tolist()) == np.flatnonzero(tokens != BOS_ID).tolist()
    assert windows.tokens.shape[1] == length + 1 and windows.tokens.dtype == np.int32
    np.testing.assert_array_equal(windows.tokens[:, 1:][windows.scored], tokens[targets])
    assert (windows.scored[1:].sum(axis=1) <= stride).all()
    left = np.broadcast_to(np.arange(1, length + 1), windows.scored.shape)
    assert (left[1:][windows.scored[1:]] >= length - stride + 1).all()
    assert windows.text_bytes.sum() == sum(len(text.encode()) for text in DOCUMENTS)


def test_window_batches_hold_every_window_and_fill_the_last(tokenizer: Tokenizer, tokens: np.ndarray):
    windows = eval_windows(tokens, 8, 4, token_bytes(tokenizer))
    size = len(windows) - 1
    (first, first_scored), (second, second_scored) = windows.batches(size)
    assert first.shape == second.shape == (size, 9) and second_scored.shape == (size, 8)
    np.testing.assert_array_equal(np.concatenate([first, second[:1]]), windows.tokens)
    assert first_scored.sum() + second_scored[0].sum() == windows.scored.sum()
    assert not second_scored[1:].any()
    with pytest.raises(DataError, match="batches of 0 windows"):
        next(windows.batches(0))


def test_uniform_bytes_cost_eight_bits(tokenizer: Tokenizer):
    byte_level = train_tokenizer(DOCUMENTS, 258)
    windows = eval_windows(tokenise(DOCUMENTS, byte_level), 16, 8, token_bytes(byte_level))
    nats = windows.scored.sum() * math.log(256)
    assert bits_per_byte(nats, windows.text_bytes.sum()) == pytest.approx(8, rel=1e-12)


def test_windows_that_cannot_be_made_say_so():
    with pytest.raises(DataError, match="got stride=9, length=8"):
        eval_windows(np.zeros(20, np.uint16), 8, 9, np.zeros(1))
    with pytest.raises(DataError, match=r"shape \(1,\) hold nothing to predict"):
        eval_windows(np.zeros(1, np.uint16), 8, 8, np.zeros(1))
    with pytest.raises(DataError, match="0 bytes is undefined"):
        bits_per_byte(1.0, 0)

"""Token ids for training and evaluation: streams, seekable random batches, windows for exact bits per byte.

A token stream is every document in turn, each as `BOS_ID` and then its ids. There is no id at a document's
end: the `BOS_ID` of the next one says the same, so generation stops at either special id.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from dsv4.training.errors import DataError
from dsv4.training.tokenizer import BOS_ID, encode


def text_files(paths: Sequence[str | Path]) -> list[str]:
    """One document for each UTF-8 text file, in the order given, with line ends as `\\n`.

    Raises FileNotFoundError for a missing file, DataError for no files, an empty one or one not in UTF-8.
    """
    if not paths:
        raise DataError("no text files given; name at least one")
    documents = []
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"no text file at {path}; give paths of UTF-8 text files, not folders")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 at byte {error.start}; convert it, e.g. with iconv") from None
        if not text:
            raise DataError(f"{path} is empty; leave it out")
        documents.append(text)
    return documents


def tokenise(documents: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """The token stream of `documents`, uint16 [n]: `BOS_ID` and then the ids, for each in turn."""
    pieces = []
    for text in documents:
        pieces += [np.array([BOS_ID], np.uint16), encode(tokenizer, text)]
    return np.concatenate(pieces or [np.zeros(0, np.uint16)])


@dataclass(frozen=True, eq=False)
class Batches:
    """Training batches at random offsets of a token stream; batch `step` depends on `seed` and `step` alone.

    `tokens` integer [n], n > `length`. There is no state: training resumed at any step sees what it would
    have seen unbroken. Raises DataError for sizes that cannot work.
    """

    tokens: np.ndarray
    batch: int
    length: int
    seed: int

    def __post_init__(self) -> None:
        if self.batch < 1 or self.length < 1 or self.seed < 0:
            raise DataError(
                f"need batch >= 1, length >= 1 and seed >= 0, got batch={self.batch}, length={self.length}, "
                f"seed={self.seed}"
            )
        if self.tokens.ndim != 1 or len(self.tokens) <= self.length:
            raise DataError(
                f"tokens of shape {self.tokens.shape} hold no sequence of {self.length} + 1 ids; "
                "use a shorter train.length or more text"
            )

    def offsets_at(self, step: int) -> np.ndarray:
        """Where the sequences of batch `step` start, int64 [batch], each in 0..n-length-1."""
        if step < 0:
            raise DataError(f"step {step} is negative; steps count from 0")
        # The raw stream of a counter-based generator: NumPy keeps it the same in every version, unlike that
        # of `integers`. The remainder favours no offset by more than one part in 2^64 / n.
        raw = np.random.Philox(key=np.array([self.seed, step], np.uint64)).random_raw(self.batch)
        return (raw % np.uint64(len(self.tokens) - self.length)).astype(np.int64)

    def batch_at(self, step: int) -> np.ndarray:
        """Batch `step`, int32 [batch, length + 1]: inputs are `[:, :-1]`, targets `[:, 1:]`."""
        index = self.offsets_at(step)[:, None] + np.arange(self.length + 1)
        return self.tokens[index].astype(np.int32)


@dataclass(frozen=True, eq=False)
class EvalWindows:
    """Windows over a token stream that score each id of text exactly once.

    `tokens` int32 [n, length + 1] as in a batch; `scored` bool [n, length] marks the targets that count here;
    `text_bytes` int64 [n] counts the bytes of text of the scored targets. `BOS_ID` is given, not predicted:
    no target that is `BOS_ID` is scored.
    """

    tokens: np.ndarray
    scored: np.ndarray
    text_bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(tokens [size, length + 1], scored [size, length]) in order, the last filled with unscored rows.

        Raises DataError for a size below 1.
        """
        if size < 1:
            raise DataError(f"cannot make batches of {size} windows; need at least 1")
        for first in range(0, len(self), size):
            tokens, scored = self.tokens[first : first + size], self.scored[first : first + size]
            missing = size - len(tokens)
            if missing:
                tokens = np.concatenate([tokens, np.repeat(tokens[:1], missing, axis=0)])
                scored = np.concatenate([scored, np.zeros((missing, scored.shape[1]), bool)])
            yield tokens, scored


def eval_windows(tokens: np.ndarray, length: int, stride: int, token_bytes: np.ndarray) -> EvalWindows:
    """Windows of `length` targets, `stride` apart, over `tokens` [n]; the first to reach a target scores it.

    So every window but the first scores at most `stride` targets, each with `length - stride + 1` ids or more
    to its left. The last window ends with the stream; a stream shorter than one is padded with `BOS_ID`.
    `token_bytes` [size] is as from `tokenizer.token_bytes`. In a stream that starts with `BOS_ID` all text is
    scored, so `bits_per_byte(summed nats, windows.text_bytes.sum())` is exact. Raises DataError for a stride
    outside 1..length and for fewer than two ids.
    """
    if not 1 <= stride <= length:
        raise DataError(f"need 1 <= stride <= length, got stride={stride}, length={length}")
    if tokens.ndim != 1 or len(tokens) < 2:
        raise DataError(f"tokens of shape {tokens.shape} hold nothing to predict; need at least two ids")
    last = max(0, len(tokens) - 1 - length)
    starts = np.append(np.arange(0, last, stride), last)
    stream = np.asarray(tokens, np.int32)
    stream = np.append(stream, np.full(max(0, length + 1 - len(stream)), BOS_ID, np.int32))
    places = starts[:, None] + np.arange(length + 1)
    windows = stream[places]
    # A target is scored when the window before did not reach it. The first window has none before it.
    reached = np.append(0, starts[:-1] + length)
    scored = (places[:, 1:] > reached[:, None]) & (windows[:, 1:] != BOS_ID)
    text_bytes = np.where(scored, token_bytes[windows[:, 1:]], 0).sum(axis=1, dtype=np.int64)
    return EvalWindows(windows, scored, text_bytes)


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Bits per byte of text from the summed negative log likelihood in nats of all its scored targets."""
    if text_bytes <= 0:
        raise DataError(f"bits per byte of {text_bytes} bytes is undefined; score at least one id of text")
    return float(nats) / (math.log(2) * int(text_bytes))

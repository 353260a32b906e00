"""A byte-level BPE tokenizer: any text round-trips, nothing is unknown, two special ids.

Ids: 0 `<|begin|>` starts a document, 1 `<|end|>` ends an answer, 2..257 the 256 bytes, then the merges in the
order they were learned. There is no normaliser and no template: `encode` adds no ids, callers place `BOS_ID`.

A merge stays inside one piece of `PATTERN`: a run of letters with at most one character before it (space,
quote, bracket, hyphen, the apostrophe of `'d`), one digit, punctuation with the line ends after it, white
space.

Train one with `python -m dsv4.training.tokenizer --size 2048 --out tokenizer.json`.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dsv4.training.errors import DataError

BOS, EOS = "<|begin|>", "<|end|>"
BOS_ID, EOS_ID = 0, 1
SMALLEST = 2 + 256
LARGEST = 1 << 16  # ids are kept as uint16
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
# After a blank line `PATTERN` always ends a piece, so cutting there changes no id (a test holds this).
_PARAGRAPH = re.compile(r"(?<=\n\n)(?=\S)")


def train_tokenizer(documents: Iterable[str], size: int) -> Tokenizer:
    """A tokenizer of exactly `size` ids learned from `documents`; the same input gives the same tokenizer.

    Raises DataError when `size` is not in 258..65536, or larger than what the text has merges for.
    """
    check_size(size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    found = tokenizer.get_vocab_size()
    if found != size:
        raise DataError(f"the text has merges for {found} ids, not {size}; ask for at most {found} or add text")
    return _checked(tokenizer, "the trained tokenizer")


def check_size(size: int) -> None:
    """Raises DataError where no tokenizer of `size` ids can be made."""
    if not SMALLEST <= size <= LARGEST:
        raise DataError(f"cannot make {size} ids; choose from {SMALLEST} (2 special, 256 bytes) to {LARGEST} (uint16)")


def save_tokenizer(tokenizer: Tokenizer, path: str | Path) -> None:
    """Writes `tokenizer` as JSON to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer saved at `path`; FileNotFoundError or DataError say what is wrong with the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}; make one: python -m dsv4.training.tokenizer --out {path}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing more specific
        raise DataError(f"{path} is not a tokenizer: {error}; make one: python -m dsv4.training.tokenizer") from None
    return _checked(tokenizer, str(path))


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """`text` as uint16 ids [n] with no special ids: a `<|begin|>` inside it is spelled out like other text.

    Works by paragraphs, which gives the same ids as the whole text at once and can use more than one core.
    """
    pieces = tokenizer.encode_batch_fast(paragraphs(text), add_special_tokens=False)
    return np.concatenate([np.asarray(piece.ids, np.uint16) for piece in pieces] or [np.zeros(0, np.uint16)])


def decode(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> str:
    """The text of `ids` [n]; special ids show as their names, half a character as U+FFFD."""
    return tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def paragraphs(text: str) -> list[str]:
    """`text` cut after its blank lines; the pieces join to `text` again."""
    return _PARAGRAPH.split(text) if text else []


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text each id stands for, int64 [size]: 0 for the two special ids, 1 or more for the others."""
    lengths = np.zeros(tokenizer.get_vocab_size(), np.int64)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = len(token)  # the byte-level alphabet writes each byte as one character
    lengths[[BOS_ID, EOS_ID]] = 0
    return lengths


def bytes_per_token(tokenizer: Tokenizer, documents: Iterable[str]) -> float:
    """UTF-8 bytes of `documents` divided by their ids, the starting `<|begin|>` of each not counted."""
    sizes = [(len(text.encode()), len(encode(tokenizer, text))) for text in documents]
    return sum(size for size, _ in sizes) / sum(count for _, count in sizes)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; renamed to `path` on success, removed on an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _checked(tokenizer: Tokenizer, origin: str) -> Tokenizer:
    found = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    size = tokenizer.get_vocab_size()
    if found != (BOS_ID, EOS_ID) or not SMALLEST <= size <= LARGEST:
        raise DataError(
            f"{origin}: {BOS} and {EOS} have ids {found} among {size}, expected {(BOS_ID, EOS_ID)} among "
            f"{SMALLEST}..{LARGEST}; train one with train_tokenizer"
        )
    # Not part of the saved file: text that happens to hold "<|begin|>" must not become the special id.
    tokenizer.encode_special_tokens = True
    return tokenizer


def main() -> None:
    """Trains on the training documents, saves, and prints the bytes per token of the held-out documents."""
    from dsv4.training.corpus import load_corpus, split

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--size", type=int, default=2048, help="ids, special ones and bytes included")
    parser.add_argument("--out", type=Path, required=True, help="where tokenizer.json goes")
    arguments = parser.parse_args()
    train, held_out = split(load_corpus())
    print(f"training {arguments.size} ids on {sum(map(len, train)):,} characters", file=sys.stderr)
    tokenizer = train_tokenizer(train, arguments.size)
    save_tokenizer(tokenizer, arguments.out)
    print(f"{arguments.size} ids: {bytes_per_token(tokenizer, held_out):.4f} bytes per token of held-out text")


if __name__ == "__main__":
    main()

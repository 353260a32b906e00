"""Token files a run trains on: tokenizer.json, train.npy, held_out.npy in one folder.

    python -m dsv4.training.prepare FOLDER --vocab 2048
    python -m dsv4.training.prepare FOLDER --vocab 2048 --text novel.txt letters.txt

The first takes the project's public-domain corpus (in a clone, `uv sync --inexact --extra data`,
without uv `pip install ".[data]"`), the second your own UTF-8 text files.
Each file is one document; the last tenth of each is held out to measure bits per byte.
A tokenizer of --vocab ids, which must be the model's vocab_size, is trained on the rest.

`dsv4 train CONFIG --data FOLDER` trains on such a folder, `dsv4 train CONFIG --text FILE ...` makes one in the run's
own. A folder made once can be copied to a machine that has neither texts nor packages.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv4.training.corpus import load_corpus
from dsv4.training.corpus import split as split_works
from dsv4.training.data import text_files, tokenise
from dsv4.training.errors import DataError
from dsv4.training.tokenizer import (
    check_size,
    load_tokenizer,
    replacing,
    save_tokenizer,
    token_bytes,
    train_tokenizer,
)


@dataclass(frozen=True, eq=False)
class Tokens:
    """train and held_out: uint16 [n] token streams; token_bytes int64 [vocabulary]: bytes of text behind each id."""

    train: np.ndarray
    held_out: np.ndarray
    token_bytes: np.ndarray
    tokenizer_path: Path


def prepare(folder: Path, vocab: int, texts: Sequence[Path] | None = None) -> Tokens:
    """The tokens in `folder`, made there first if it has none.

    texts: train on these files instead of the corpus; a folder made of other text is refused. Raises DataError where
    the text, the vocabulary size or the folder will not do, OSError for files that cannot be read or written.
    """
    # The last file to be written: where it is, the others are.
    if not (folder / "held_out.npy").exists():
        _make(folder, vocab, texts)
    elif texts is not None and _digest(texts) != _recorded_digest(folder):
        raise DataError(f"{folder} was prepared from other text: use another folder, or leave the text files out")
    path = folder / "tokenizer.json"
    sizes = token_bytes(load_tokenizer(path))
    if len(sizes) != vocab:
        raise DataError(f"{folder} was prepared with {len(sizes)} ids, the model has {vocab}: use another folder")
    return Tokens(_read(folder / "train.npy"), _read(folder / "held_out.npy"), sizes, path)


def _make(folder: Path, vocab: int, texts: Sequence[Path] | None) -> None:
    check_size(vocab)
    train, held_out = split_works(load_corpus()) if texts is None else _own_documents(texts)
    print(f"training a tokenizer of {vocab} ids and tokenising into {folder}", file=sys.stderr)
    tokenizer = train_tokenizer(train, vocab)
    streams = {"train": tokenise(train, tokenizer), "held_out": tokenise(held_out, tokenizer)}
    # Nothing is written before all of it is known to work.
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    with replacing(folder / "source.txt") as temporary:
        temporary.write_text("corpus\n" if texts is None else _digest(texts) + "\n")
    for name, tokens in streams.items():
        with replacing(folder / f"{name}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, tokens)


def _own_documents(texts: Sequence[Path]) -> tuple[list[str], list[str]]:
    """(training documents, held-out documents): nine tenths of each text, and the last."""
    documents = text_files(texts)
    cut = [max(1, len(text) * 9 // 10) for text in documents]
    train = [text[:end] for text, end in zip(documents, cut, strict=True)]
    held_out = [text[end:] for text, end in zip(documents, cut, strict=True) if text[end:]]
    if not held_out:
        raise DataError(f"{len(documents)} texts of one character leave nothing to hold out: add text")
    return train, held_out


def _digest(texts: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for text in text_files(texts):
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _recorded_digest(folder: Path) -> str:
    path = folder / "source.txt"
    return path.read_text().strip() if path.exists() else ""


def _read(path: Path) -> np.ndarray:
    try:
        tokens = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"{path} is no array of tokens ({error}): prepare another folder") from None
    if tokens.ndim != 1 or tokens.dtype != np.uint16:
        raise DataError(f"{path} is {tokens.dtype} {tokens.shape}, tokens are uint16 [n]: prepare another folder")
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("--vocab", type=int, default=2048, help="ids of the tokenizer: the model's vocab_size")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="UTF-8 text files instead of the corpus")
    options = parser.parse_args()
    try:
        tokens = prepare(options.folder, options.vocab, options.text)
    except (DataError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"{len(tokens.train)} training and {len(tokens.held_out)} held-out tokens in {options.folder}")


if __name__ == "__main__":
    main()

"""Token files a run trains on: tokenizer.json, train.npy, held_out.npy in one folder.

    python -m dsv4.training.prepare FOLDER --vocab 2048 [--text FILE ...]

Made from the project's public-domain corpus (the `data` extra), or from your own text files, of which the last tenth
is held out. A folder made once can be copied to a machine that has neither.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv4.training.corpus import load_corpus
from dsv4.training.corpus import split as split_works
from dsv4.training.data import text_files, tokenise
from dsv4.training.tokenizer import load_tokenizer, replacing, save_tokenizer, token_bytes, train_tokenizer


@dataclass(frozen=True, eq=False)
class Tokens:
    """train and held_out: uint16 [n] token streams; token_bytes int64 [vocabulary]: bytes of text behind each id."""

    train: np.ndarray
    held_out: np.ndarray
    token_bytes: np.ndarray
    tokenizer_path: Path


def prepare(folder: Path, vocab: int, texts: list[Path] | None = None) -> Tokens:
    """The tokens in `folder`, made there first if it has none. Raises ValueError for another vocabulary size."""
    path = folder / "tokenizer.json"
    if not (folder / "held_out.npy").exists():
        train, held_out = _documents(texts)
        print(f"training a tokenizer of {vocab} ids and tokenising into {folder}", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = train_tokenizer(train, vocab)
        save_tokenizer(tokenizer, path)
        for name, documents in (("train", train), ("held_out", held_out)):
            tokens = tokenise(documents, tokenizer)
            with replacing(folder / f"{name}.npy") as temporary, temporary.open("wb") as file:
                np.save(file, tokens)
    sizes = token_bytes(load_tokenizer(path))
    if len(sizes) != vocab:
        raise ValueError(f"{folder} was prepared with {len(sizes)} ids, the model has {vocab}: use another folder")
    return Tokens(np.load(folder / "train.npy"), np.load(folder / "held_out.npy"), sizes, path)


def _documents(texts: list[Path] | None) -> tuple[list[str], list[str]]:
    if texts is None:
        return split_works(load_corpus())
    documents = text_files(texts)
    cut = [max(1, len(text) * 9 // 10) for text in documents]
    train = [text[:end] for text, end in zip(documents, cut, strict=True)]
    return train, [text[end:] for text, end in zip(documents, cut, strict=True) if text[end:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--text", type=Path, nargs="+")
    options = parser.parse_args()
    tokens = prepare(options.folder, options.vocab, options.text)
    print(f"{len(tokens.train)} training and {len(tokens.held_out)} held-out tokens in {options.folder}")


if __name__ == "__main__":
    main()

"""Text as windows of a model's own tokens, with the bytes that each token stands for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from dsv4.decoding.inputs import InputError
from dsv4.decoding.text import encode, load_tokenizer
from dsv4.model.handle import Model
from dsv4.training.corpus import load_corpus, split
from dsv4.training.data import EvalWindows, eval_windows, text_files
from dsv4.training.errors import DataError
from dsv4.training.tokenizer import BOS_ID

HELD_OUT = "held_out"


def documents(source: str) -> list[str]:
    """The held-out works of the project's corpus for `held_out`, else the one text in the UTF-8 file `source`.

    Raises DataError for a corpus that is not installed and for text that is empty or not UTF-8, FileNotFoundError.
    """
    return split(load_corpus())[1] if source == HELD_OUT else text_files([Path(source)])


def model_windows(model: Model, texts: Iterable[str], length: int, count: int) -> EvalWindows:
    """At most `count` windows of `length` targets, spread evenly over `texts`, in the ids of the model's tokenizer.

    Windows do not overlap but for the last of the text. Raises InputError for a model without a tokenizer or with a
    context below `length`, DataError for text shorter than one window.
    """
    if length > model.config.max_context:
        raise InputError(f"windows of {length} tokens exceed the model's context of {model.config.max_context}")
    if model.config.bos_id != BOS_ID:
        raise DataError(f"the model's begin id is {model.config.bos_id}, windows of text are made with {BOS_ID}")
    tokenizer = load_tokenizer(model)
    stream = np.concatenate([np.array([BOS_ID, *encode(tokenizer, text)], np.int32) for text in texts])
    if len(stream) <= length:
        raise DataError(
            f"the text has {len(stream)} tokens, one window of {length} needs {length + 1}: "
            "give more text or a smaller length"
        )
    return spread(eval_windows(stream, length, length, token_bytes(tokenizer, model.config.vocab_size)), count)


def spread(windows: EvalWindows, count: int) -> EvalWindows:
    """At most `count` of `windows`, evenly spaced, in order."""
    chosen = np.unique(np.linspace(0, len(windows) - 1, min(count, len(windows))).round().astype(int))
    return EvalWindows(windows.tokens[chosen], windows.scored[chosen], windows.text_bytes[chosen])


def token_bytes(tokenizer: Tokenizer, size: int) -> np.ndarray:
    """Bytes of text behind each id of a byte-level BPE tokenizer, int64 [size]; 0 for special ids."""
    lengths = np.zeros(size, np.int64)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = len(token)  # the byte-level alphabet writes each byte as one character
    for index, token in tokenizer.get_added_tokens_decoder().items():
        lengths[index] = 0 if token.special else len(token.content.encode())
    return lengths

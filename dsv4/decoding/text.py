"""Text to token ids and back, with the byte-level BPE tokenizer that lies beside a checkpoint."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers

from dsv4.config import ModelConfig
from dsv4.decoding.inputs import InputError
from dsv4.model.handle import Model

EMPTY_PROMPT = "the prompt is empty: give at least one token to continue"


def load_tokenizer(model: Model) -> tokenizers.Tokenizer:
    """The tokenizer of `model`. Raises InputError where there is none, or one with more ids than the model knows."""
    if model.tokenizer_path is None:
        raise InputError(
            "this model has no tokenizer: put its tokenizer.json beside the checkpoint's config.json, "
            "or pass token ids to dsv4.decoding.generate.stream"
        )
    path = Path(model.tokenizer_path)
    if not path.is_file():
        raise InputError(f"the tokenizer {path} does not exist: put the model's tokenizer.json there")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing more specific
        raise InputError(f"{path} is not a tokenizer: {error}") from None
    size = tokenizer.get_vocab_size()
    if size > model.config.vocab_size:
        raise InputError(
            f"{path} has {size} ids but the model's vocabulary has {model.config.vocab_size}: "
            "it belongs to another model"
        )
    # A prompt is text: "<|begin|>" written in it must not become the special id.
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    """The ids of `text`, no special ones added."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def prompt_ids(config: ModelConfig, ids: Sequence[int]) -> list[int]:
    """`ids` with the begin id before them, once. Raises InputError for an empty prompt."""
    if len(ids) == 0:
        raise InputError(EMPTY_PROMPT)
    return [*([] if ids[0] == config.bos_id else [config.bos_id]), *ids]


class TextDecoder:
    """Ids to text as they come. A token may end inside a character: its bytes are held back until the rest arrives.

    Special ids have no text. Bytes that can never become a character show as U+FFFD.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that is certain once `token` is known, often empty."""
        return self._utf8.decode(self._bytes(token))

    def finish(self) -> str:
        """What is still held back at the end: nothing, or one U+FFFD."""
        return self._utf8.decode(b"", final=True)

    def _bytes(self, token: int) -> bytes:
        if (added := self._added.get(token)) is not None:
            return b"" if added.special else added.content.encode()
        piece = self._tokenizer.id_to_token(token)
        if piece is None:  # the model's vocabulary may be padded beyond the tokenizer's
            return "\N{REPLACEMENT CHARACTER}".encode()
        try:
            return bytes(_byte_alphabet()[character] for character in piece)
        except KeyError as error:
            raise InputError(
                f"token {token} is {piece!r}: {error} is no byte of a byte-level BPE tokenizer, the only kind read here"
            ) from None


def stream_text(decoder: TextDecoder, tokens: Iterator[int]) -> Iterator[str]:
    """The text of `tokens` piece by piece, characters whole."""
    for token in tokens:
        if piece := decoder.feed(token):
            yield piece
    if piece := decoder.finish():
        yield piece


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """How byte-level BPE spells bytes: printable Latin-1 as itself, the 68 others as the code points from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}

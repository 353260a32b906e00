"""Text and token ids from a model: prefill the prompt, then one jitted step a token."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4.config import ModelConfig
from dsv4.decoding.inputs import InputError, check_ids
from dsv4.decoding.run import extend_body, last_logits
from dsv4.decoding.sample import Sampling, sample
from dsv4.decoding.text import (
    EMPTY_PROMPT,
    TextDecoder,
    encode,
    load_tokenizer,
    prompt_ids,
    stream_text,
)
from dsv4.model.cache import Cache, init_cache
from dsv4.model.handle import Model

# Caches and last prefill chunks are rounded up to powers of two from here on, so that prompts of many lengths share
# a few compiled programs.
SMALLEST_CAPACITY = 256
SMALLEST_CHUNK = 16
GREEDY = Sampling()
Chunk = tuple[np.ndarray, np.ndarray]  # ids [1, T] of which the first count [1] are real


@dataclass
class GenerationStats:
    """Wall-clock seconds on finished results, compilation (and the warm-up, where there was one) apart.

    prefill_seconds: from the prompt to its first new token. decode_seconds: from the first new token to the last, which
    are `new_tokens - 1` steps; it includes the time the reader of the stream keeps each token.
    """

    prompt_tokens: int
    new_tokens: int = 0
    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


class Generation(Iterator[int]):
    """New token ids as they come, up to the first that is in `ends`.

    `stats` covers those given so far; `cache` may be one step ahead of them.
    """

    def __init__(
        self, model: Model, ids: np.ndarray, max_new: int, sampling: Sampling, seed: int, ends: Container[int]
    ) -> None:
        self.stats = GenerationStats(prompt_tokens=ids.shape[1])
        capacity = _power_of_two(ids.shape[1] + max_new, SMALLEST_CAPACITY, model.config.max_context)
        self.cache = init_cache(model.config, model.execution, 1, capacity)
        # A program belongs to a model wherever its tokenizer lies.
        self._model = model.replace(tokenizer_path=None)
        self._sampling, self._key = sampling, jax.random.key(seed)
        self._chunks = list(_chunks(ids, model.execution.prefill_chunk))
        self._compile()
        self._tokens = self._run(max_new, ends)

    def __next__(self) -> int:
        return next(self._tokens)

    def _compile(self) -> None:
        """Compiles every program of this run; jit finds them again when it is called with the same shapes."""
        begin = time.perf_counter()
        for ids, count in self._distinct_chunks():
            last_logits.lower(self._model, ids, count, self.cache).compile()
        token = self._first(jnp.zeros((1, self._model.config.vocab_size), jnp.float32))
        _step.lower(self._model, token, self._key, self.cache, self._sampling).compile()
        self.stats.compile_seconds = time.perf_counter() - begin

    def warm_up(self) -> None:
        """Runs every program once: a device loads code at its first run, which no steady rate should contain."""
        begin = time.perf_counter()
        logits, spare = self._prefill(self._distinct_chunks())
        _step(self._model, self._first(logits), self._key, spare, self._sampling)[0].block_until_ready()
        self.stats.compile_seconds += time.perf_counter() - begin

    def _run(self, max_new: int, ends: Container[int]) -> Iterator[int]:
        begin = time.perf_counter()
        logits, self.cache = self._prefill(self._chunks)
        token = self._first(logits).block_until_ready()
        self.stats.prefill_seconds = time.perf_counter() - begin
        begin = time.perf_counter()
        for number in range(1, max_new + 1):
            following = token
            if number < max_new:  # the device works on the next token while the host reads this one
                following, self.cache = _step(self._model, token, self._key, self.cache, self._sampling)
            value = token.item()
            self.stats.new_tokens = number
            self.stats.decode_seconds = time.perf_counter() - begin if number > 1 else 0.0
            yield value
            if value in ends:
                return
            token = following

    def _prefill(self, chunks: Iterable[Chunk]) -> tuple[jax.Array, Cache]:
        """Logits [1, V] after the last chunk, and the cache."""
        (ids, count), *rest = chunks
        logits, cache = last_logits(self._model, ids, count, self.cache)
        for ids, count in rest:
            logits, cache = last_logits(self._model, ids, count, cache)
        return logits, cache

    def _first(self, logits: jax.Array) -> jax.Array:
        return _choose(logits, self._key, self.cache.length, self._sampling)

    def _distinct_chunks(self) -> Iterable[Chunk]:
        return {ids.shape: (ids, count) for ids, count in self._chunks}.values()


def stream(
    model: Model,
    ids: Any,
    *,
    max_new: int = 128,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop_at_eos: bool = True,
) -> Generation:
    """Up to `max_new` new ids after the prompt `ids` [T], which is taken as it is (start it with `config.bos_id`).

    Compiles at once; the prompt is processed when the first token is asked for. A token depends on the ids before it,
    the seed and its position only. With `stop_at_eos` the first `config.eos_id` or `config.bos_id` is the last one
    given: a text ends with the one, or where the next would begin with the other, as documents do in training. Raises
    InputError for a prompt that is empty, out of range or leaves no room for `max_new`.
    """
    if len(ids) == 0:
        raise InputError(EMPTY_PROMPT)
    rows = np.asarray(check_ids(np.asarray(ids)[None], model.config))
    check_room(rows.shape[1], max_new, model.config)
    ends = (model.config.eos_id, model.config.bos_id) if stop_at_eos else ()
    return Generation(model, rows, max_new, _canonical(sampling), seed, ends)


def generate(
    model: Model,
    prompt: str | Sequence[int],
    *,
    max_new: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """The text that continues `prompt`, without it. Greedy unless `temperature` is above 0; ends with the document.

    The prompt is text or token ids; `config.bos_id` is put before it unless the ids start with it already.
    Raises InputError as `stream`, and where the model has no tokenizer.
    """
    tokenizer = load_tokenizer(model)
    ids = prompt_ids(model.config, encode(tokenizer, prompt) if isinstance(prompt, str) else prompt)
    tokens = stream(model, ids, max_new=max_new, sampling=Sampling(temperature, top_k, top_p), seed=seed)
    return "".join(stream_text(TextDecoder(tokenizer), tokens))


def check_room(prompt: int, max_new: int, config: ModelConfig) -> None:
    """Raises InputError, saying what is left, where prompt and new tokens do not fit the model's context."""
    if max_new < 1:
        raise InputError(f"max_new is {max_new}: ask for at least 1 new token")
    left = config.max_context - prompt
    if left < 0:
        raise InputError(
            f"the prompt has {prompt} tokens but the model's context is {config.max_context}: "
            f"shorten it by at least {-left + 1}"
        )
    if max_new > left:
        raise InputError(
            f"{max_new} new tokens do not fit: the prompt has {prompt} tokens (begin id included), which leaves "
            f"{left} of the model's context of {config.max_context}; ask for fewer or shorten the prompt"
        )


def _step_body(
    model: Model, token: jax.Array, key: jax.Array, cache: Cache, sampling: Sampling
) -> tuple[jax.Array, Cache]:
    """One decode step: token [B] in, the next token [B] and the new cache out. Nothing goes through the host."""
    logits, cache = extend_body(model, token[:, None], jnp.ones_like(token), cache)
    return _choose(logits[:, 0], key, cache.length, sampling), cache


@jax.jit
def _choose(logits: jax.Array, key: jax.Array, length: jax.Array, sampling: Sampling) -> jax.Array:
    return sample(logits, jax.random.fold_in(key, length[0]), sampling)


_step = jax.jit(_step_body, donate_argnames="cache")  # the cache is updated in place


def _chunks(ids: np.ndarray, size: int) -> Iterator[Chunk]:
    """The prompt in parts of `size` tokens; the last is padded to a power of two."""
    for begin in range(0, ids.shape[1], size):
        chunk = ids[:, begin : begin + size]
        count = chunk.shape[1]
        padded = _power_of_two(count, SMALLEST_CHUNK, size)
        yield np.pad(chunk, ((0, 0), (0, padded - count))), np.array([count], np.int32)


def _power_of_two(value: int, smallest: int, largest: int) -> int:
    return min(max(smallest, 1 << (value - 1).bit_length()), largest)


def _canonical(sampling: Sampling) -> Sampling:
    """Python scalars, so that numpy ones do not compile a second program."""
    return Sampling(float(sampling.temperature), int(sampling.top_k), float(sampling.top_p))

"""Checks of what users pass in: every error names the value, what is allowed, and what to do."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dsv4.config import ModelConfig


class InputError(ValueError):
    """Token ids, lengths or a prompt that cannot be run."""


def check_ids(ids: Any, config: ModelConfig) -> jax.Array:
    """ids as int32 [B, T]. Raises InputError for a wrong shape, dtype, an empty sequence or an id out of range."""
    if not isinstance(ids, jax.Array):
        ids = np.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise InputError(f"token ids have dtype {ids.dtype}: integers are needed")
    if ids.ndim != 2:
        raise InputError(f"token ids have shape {ids.shape}: [batch, tokens] is needed; write ids[None] for one row")
    if 0 in ids.shape:
        raise InputError(f"token ids have shape {ids.shape}: an empty prompt; give at least one token a row")
    if not isinstance(ids, Tracer):
        _check_range(ids, config)
    return jnp.asarray(ids, jnp.int32)


def check_lengths(lengths: Any, batch: int, tokens: int) -> np.ndarray:
    """Real tokens of each right-padded row, int32 [B]. Raises InputError unless 1 <= length <= tokens."""
    if lengths is None:
        return np.full(batch, tokens, np.int32)
    lengths = np.asarray(lengths)
    if lengths.shape != (batch,):
        raise InputError(f"lengths have shape {lengths.shape}, expected ({batch},): one for each row of ids")
    if not np.issubdtype(lengths.dtype, np.integer):
        raise InputError(f"lengths are {lengths.tolist()}, {lengths.dtype}: integers are needed")
    if lengths.min() < 1 or lengths.max() > tokens:
        raise InputError(f"lengths are {lengths.tolist()}: each must be between 1 and {tokens}, the width of ids")
    return lengths.astype(np.int32)


def check_batch(batch: int, cached: int) -> None:
    """Raises InputError where ids of `batch` rows meet a cache of `cached` sequences."""
    if batch != cached:
        raise InputError(
            f"the ids have {batch} rows and the cache holds {cached} sequences: give one row for each, "
            "or prefill a cache of that many"
        )


def check_step(tokens: Any, count: Any, largest: int, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """(ids int32 [B, T], count int32 [B]) of a decode step. Raises InputError for what is wrong and can be seen.

    Inside jit values cannot be seen, and token ids that are on a device already are not fetched to look at them.
    """
    ids = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise InputError(f"tokens have dtype {ids.dtype}: integers are needed")
    if ids.ndim not in (1, 2) or 0 in ids.shape:
        raise InputError(f"tokens have shape {ids.shape}: [batch] or [batch, tokens] is needed, none of them 0")
    ids = ids[:, None] if ids.ndim == 1 else ids
    batch, width = ids.shape
    if width > largest:
        raise InputError(f"decode_step got {width} tokens a row, at most {largest}: use prefill(cache=...)")
    if not isinstance(ids, jax.Array):
        _check_range(ids, config)
    if count is None:
        return jnp.asarray(ids, jnp.int32), jnp.full(batch, width, jnp.int32)
    count = count if isinstance(count, jax.Array) else np.asarray(count)
    if count.shape != (batch,) or not jnp.issubdtype(count.dtype, jnp.integer):
        raise InputError(f"count is {count.dtype} {count.shape}: integers ({batch},) are needed, one for each row")
    if not isinstance(count, Tracer) and (int(count.min()) < 0 or int(count.max()) > width):
        raise InputError(f"count is {count.tolist()}: each must be between 0 and {width}, the tokens of a row")
    return jnp.asarray(ids, jnp.int32), jnp.asarray(count, jnp.int32)


def check_capacity(tokens: int, capacity: int, config: ModelConfig) -> None:
    """Raises InputError where `tokens` do not fit a cache of `capacity` or the model's context."""
    if capacity > config.max_context:
        raise InputError(f"a capacity of {capacity} tokens exceeds the model's context of {config.max_context}")
    if tokens > capacity:
        raise InputError(
            f"{tokens} tokens do not fit: the capacity is {capacity} and the model's context "
            f"{config.max_context}; shorten the prompt or ask for a larger capacity"
        )


def _check_range(ids: Any, config: ModelConfig) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= config.vocab_size:
        wrong = low if low < 0 else high
        raise InputError(f"token id {wrong} is out of range: the vocabulary has ids 0..{config.vocab_size - 1}")

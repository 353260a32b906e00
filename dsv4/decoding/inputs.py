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
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= config.vocab_size:
            wrong = low if low < 0 else high
            raise InputError(f"token id {wrong} is out of range: the vocabulary has ids 0..{config.vocab_size - 1}")
    return jnp.asarray(ids, jnp.int32)


def check_lengths(lengths: Any, batch: int, tokens: int) -> np.ndarray:
    """Real tokens of each right-padded row, int32 [B]. Raises InputError unless 1 <= length <= tokens."""
    if lengths is None:
        return np.full(batch, tokens, np.int32)
    lengths = np.asarray(lengths)
    if lengths.shape != (batch,):
        raise InputError(f"lengths have shape {lengths.shape}, expected ({batch},): one for each row of ids")
    if lengths.min() < 1 or lengths.max() > tokens:
        raise InputError(f"lengths are {lengths.tolist()}: each must be between 1 and {tokens}, the width of ids")
    return lengths.astype(np.int32)


def check_capacity(tokens: int, capacity: int, config: ModelConfig) -> None:
    """Raises InputError where `tokens` do not fit a cache of `capacity` or the model's context."""
    if capacity > config.max_context:
        raise InputError(f"a capacity of {capacity} tokens exceeds the model's context of {config.max_context}")
    if tokens > capacity:
        raise InputError(
            f"{tokens} tokens do not fit: the capacity is {capacity} and the model's context "
            f"{config.max_context}; shorten the prompt or ask for a larger capacity"
        )

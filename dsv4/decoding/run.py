"""The three ways through a model: full sequence, prefill in chunks, one step at a time. All give the same logits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4.decoding.inputs import InputError, check_batch, check_capacity, check_ids, check_lengths, check_step
from dsv4.model.cache import Cache, init_cache
from dsv4.model.handle import Model
from dsv4.model.transformer import Trace
from pallas_kernels.ring import MAX_STEP


def forward(model: Model, ids: Any, *, trace: bool = False) -> jax.Array | tuple[jax.Array, Trace]:
    """Logits float32 [B, T, V] of whole sequences ids [B, T]; with `trace`, also everything chosen on the way.

    Only this way through the model has a trace: to see what decoding chooses, pass the tokens it has made.
    Raises InputError for ids that are empty, out of range or longer than the model's context.
    """
    ids = check_ids(ids, model.config)
    check_capacity(ids.shape[1], model.config.max_context, model.config)
    logits, seen = _forward(model, ids, trace)
    return (logits, seen) if trace else logits


def prefill(
    model: Model,
    ids: Any,
    *,
    lengths: Any = None,
    capacity: int | None = None,
    cache: Cache | None = None,
) -> tuple[jax.Array, Cache]:
    """Feeds prompts ids [B, T] (right-padded to `lengths`): logits float32 [B, V] after each row's last token.

    Runs `model.execution.prefill_chunk` tokens at a time. `capacity` (default: the prompt and room for 1024 tokens)
    bounds what may be decoded later; `cache` continues one that already holds tokens, of as many rows and with a
    capacity of its own. Raises InputError as `forward`, and where the tokens do not fit.
    """
    ids = check_ids(ids, model.config)
    batch, tokens = ids.shape
    lengths = check_lengths(lengths, batch, tokens)
    if cache is None:
        longest = int(lengths.max())
        if capacity is None:
            capacity = max(longest, min(tokens + 1024, model.config.max_context))
        check_capacity(longest, capacity, model.config)
        state = init_cache(model.config, model.execution, batch, capacity)
    else:
        if capacity is not None:
            raise InputError(f"capacity={capacity} with a cache, which holds {cache.capacity} tokens: give one of them")
        check_batch(batch, cache.length.shape[0])
        check_capacity(int((np.asarray(cache.length) + lengths).max()), cache.capacity, model.config)
        state = cache
    last = jnp.zeros((batch, model.config.vocab_size), jnp.float32)
    for begin in range(0, int(lengths.max()), model.execution.prefill_chunk):
        chunk = ids[:, begin : begin + model.execution.prefill_chunk]
        count = np.clip(lengths - begin, 0, chunk.shape[1]).astype(np.int32)
        logits, state = last_logits(model, chunk, jnp.asarray(count), state)
        last = jnp.where(jnp.asarray(count > 0)[:, None], logits, last)  # rows that ended keep their own
    return last, state


def decode_step(model: Model, tokens: Any, cache: Cache, *, count: Any = None) -> tuple[jax.Array, Cache]:
    """One step: tokens [B] or [B, T] with T <= 4 -> logits float32 [B, V] or [B, T, V], and the new cache.

    `count` int32 [B] (default: all) says how many of a row's tokens are real; 0 leaves the row as it was. A row whose
    cache is full gets NaN logits: a jitted step cannot raise, and a wrong token must not pass for a right one. Raises
    InputError for shapes and dtypes that do not fit, a `count` outside 0..T, and ids out of range that are on the host.
    """
    ids, real = check_step(tokens, count, MAX_STEP, model.config)
    check_batch(ids.shape[0], cache.length.shape[0])
    logits, cache = extend(model, ids, real, cache)
    return (logits[:, 0] if np.ndim(tokens) == 1 else logits), cache


def forward_body(model: Model, ids: jax.Array, trace: bool) -> tuple[jax.Array, Trace | None]:
    with jax.default_matmul_precision(model.execution.precision):
        module = model.bind()
        count = jnp.full(ids.shape[0], ids.shape[1], jnp.int32)
        hidden, _, seen = module(ids, count, None)
        return module.logits(hidden), seen if trace else None


def extend_body(model: Model, ids: jax.Array, count: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Logits [B, T, V] of the next tokens of cached sequences, not jitted: for use inside larger programs."""
    with jax.default_matmul_precision(model.execution.precision):
        module = model.bind()
        hidden, new, _ = module(ids, count, cache)
        assert new is not None
        position = cache.length[:, None] + jnp.arange(ids.shape[1])[None]
        return _poison(module.logits(hidden), position, cache), new


def _last_body(model: Model, ids: jax.Array, count: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    with jax.default_matmul_precision(model.execution.precision):
        module = model.bind()
        hidden, new, _ = module(ids, count, cache)
        assert new is not None
        at = jnp.maximum(count - 1, 0)[:, None, None]
        logits = module.logits(jnp.take_along_axis(hidden, at, axis=1)[:, 0])
        return _poison(logits, new.length - 1, cache), new


def _poison(logits: jax.Array, position: jax.Array, cache: Cache) -> jax.Array:
    """NaN where a row's token lies behind the end of its cache."""
    return jnp.where((position < cache.capacity)[..., None], logits, jnp.nan)


_forward = jax.jit(forward_body, static_argnums=2)
extend = jax.jit(extend_body)
last_logits = jax.jit(_last_body)

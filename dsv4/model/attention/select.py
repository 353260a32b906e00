"""Which compressed entries each query sees: the one thing in which the layer kinds differ."""

from __future__ import annotations

from typing import NamedTuple

import jax

from pallas_kernels.top_k import top_k


class Selection(NamedTuple):
    """indices int32 [B, T, k], -1 for none (None: the first `counts` entries in order); counts int32 [B, T]."""

    indices: jax.Array | None
    counts: jax.Array


def visible(position: jax.Array, ratio: int) -> jax.Array:
    """How many entries the query at `position` may see: the block that it closes itself is the last of them."""
    return (position + 1) // ratio


def select_all(position: jax.Array, ratio: int) -> Selection:
    """HCA: every visible entry."""
    return Selection(None, visible(position, ratio))


def select_best(scores: jax.Array, k: int, position: jax.Array, ratio: int, implementation: str) -> Selection:
    """CSA: the k visible entries with the highest index score."""
    count = visible(position, ratio)
    index = top_k(jax.lax.stop_gradient(scores), k, count, implementation=implementation)
    return Selection(index, count.clip(max=index.shape[-1]))

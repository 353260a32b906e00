"""The Hopper kernels as an implementation of `top_k`: which calls they take."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.block_matmul.sm90 import device_reason
from pallas_kernels.top_k.tiling import BLOCK, MOST_CHOSEN, MOST_ENTRIES, MOST_ROWS, SINGLE, default_tiling


def unsupported_reason(scores: jax.Array, k: int, counts: jax.Array) -> str | None:
    """Why the Hopper kernels do not take this call, None if they do."""
    if reason := device_reason():
        return reason
    columns = scores.shape[-1]
    if scores.dtype != jnp.float32 or counts.dtype != jnp.int32:
        return f"scores are {scores.dtype} and counts {counts.dtype}: it takes float32 and int32"
    if not 1 <= columns <= MOST_ENTRIES:
        return f"a row of {columns} entries: it takes 1 to {MOST_ENTRIES}"
    if not 1 <= min(k, columns) <= MOST_CHOSEN:
        return f"the {k} best: it takes 1 to {MOST_CHOSEN}"
    if columns > SINGLE and columns % BLOCK:
        return f"a row of {columns} entries: above {SINGLE} it takes multiples of {BLOCK}"
    if columns > SINGLE and counts.size > MOST_ROWS:
        return f"{counts.size} rows of {columns} entries: above {SINGLE} entries it takes up to {MOST_ROWS}"
    return None if counts.size else "there are no rows"


def top_k(scores: jax.Array, k: int, counts: jax.Array) -> jax.Array:
    """`reference.top_k`."""
    from pallas_kernels.top_k import kernel_sm90  # here: who runs no kernel does not wait for Pallas

    columns = scores.shape[-1]
    k = min(k, columns)
    rows = jax.lax.stop_gradient(scores).reshape(-1, columns)
    chosen = kernel_sm90.top_k(rows, k, counts.reshape(-1), default_tiling(columns, k))
    return chosen.reshape(*counts.shape, k)

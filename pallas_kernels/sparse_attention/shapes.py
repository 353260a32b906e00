"""What the operands of sparse attention must agree in: kernels read by address, and would read something else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.operands import require_floats, require_plain_floats
from pallas_kernels.quant import outline
from pallas_kernels.rotary import Rotation


def require_alike(
    q: jax.Array,
    entries: Mapping[str, Any],
    named: Mapping[str, jax.Array | None],
    sink: jax.Array | None,
    rotation: Rotation | None = None,
) -> None:
    """Raises ValueError, naming the operand, where it does not fit q [B, T, H, K]; TypeError where it is not of floats.

    entries: by name, [B, S, K] or pages of B sequences; None is left out. named: indices [B, T, n], counts [B, T].
    """
    require_floats(q=q)
    require_plain_floats(**{f"{name} entries": x for name, x in entries.items()})
    if q.ndim != 4:
        raise ValueError(f"q has shape {q.shape}: [B, T, H, K]")
    batch, tokens, heads, width = q.shape
    for name, x in entries.items():
        if x is None:
            continue
        sequences, found = outline(x, f"{name} entries")
        if found != width:
            raise ValueError(f"{name} entries have {found} channels, q has {width}: both are keys of one width")
        if sequences not in (None, batch):
            raise ValueError(f"{name} entries are of {sequences} sequences, q is of {batch}: one of each")
    for name, x in named.items():
        if x is None:
            continue
        axes = 2 if name.endswith("count") else 3
        if x.shape[:2] != (batch, tokens) or x.ndim != axes or not jnp.issubdtype(x.dtype, jnp.integer):
            wanted = f"{(batch, tokens)}" if axes == 2 else f"{(batch, tokens)} and an axis of entries"
            raise ValueError(f"{name} has shape {x.shape}, {x.dtype}: integers, by q's batch and tokens, {wanted}")
    if sink is not None and sink.shape != (heads,):
        raise ValueError(f"sink has shape {sink.shape}: it has one value for each of q's {heads} heads")
    if rotation is not None:
        cos, sin = rotation
        if cos.shape != sin.shape or cos.shape[:-1] != (batch, tokens) or not 0 < 2 * cos.shape[-1] <= width:
            raise ValueError(
                f"rotation has cosines {cos.shape} and sines {sin.shape}: both are [B, T, half], {(batch, tokens)} and "
                f"at most half of q's {width} channels"
            )
    if entries["compressed"] is not None and named["compressed_index"] is None and named["compressed_count"] is None:
        raise ValueError("compressed entries have neither index nor count: give one, or both")

"""The turn of an output's rotary channels, in the registers that hold it, on Hopper.

    turned[c] = cos[c] x[c] + sin[c] x[c ^ 1]

A pair of channels lies side by side in one thread, so that nothing is exchanged between threads.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic.lanes import exchanged
from pallas_kernels.rotary import Rotation


def factors(by: Rotation, width: int, end: int) -> jax.Array:
    """float32 [N, 2, width]: cosines and signed sines of every channel, of which those before `end` are turned last.

    by: cosines and sines [B, T, half], N = B * T. Channels that are not turned have 1 and 0.
    """
    cos, sin = (x.reshape(-1, x.shape[-1]) for x in by)
    begin = end - 2 * cos.shape[-1]
    across = ((0, 0), (begin, width - end))
    cos = jnp.pad(cos.repeat(2, -1), across, constant_values=1)
    sin = jnp.pad(jnp.stack([-sin, sin], axis=-1).reshape(sin.shape[0], -1), across)
    return jnp.stack([cos, sin], axis=1)


def turned(x: jax.Array, cos: jax.Array, sin: jax.Array, layout: Any) -> jax.Array:
    """float32 x [columns] or [rows, columns] of this layout, and factors like it."""
    return x * cos + exchanged(x, 1, layout) * sin

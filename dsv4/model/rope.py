"""Rotary frequencies of a layer, YaRN included."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dsv4.config import AttentionConfig, LayerConfig, YarnConfig


def frequencies(config: AttentionConfig, layer: LayerConfig) -> Float[Array, " half"]:
    """float32 [R/2] radians a token. Compressed layers have their own theta and, if configured, YaRN.

    No attention (mscale) factor: the released model has none. The layer's queries, window keys, compressed entries
    and indexer all use these.
    """
    theta = config.compress_rope_theta if layer.compressed else config.rope_theta
    pair = np.arange(0, config.rope_dim, 2, dtype=np.float32)
    plain = (1.0 / theta ** (pair / config.rope_dim)).astype(np.float32)
    if not layer.compressed or config.yarn is None:
        return jnp.asarray(plain)
    keep = _kept(config.yarn, theta, config.rope_dim)
    return jnp.asarray(plain / np.float32(config.yarn.factor) * (1 - keep) + plain * keep)


def _kept(yarn: YarnConfig, theta: float, rope_dim: int) -> np.ndarray:
    """Per pair, how much of the plain frequency stays: 1 for fast rotations, 0 for slow ones."""

    def pair_of(rotations: float) -> float:
        return rope_dim * math.log(yarn.original_context / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low = max(math.floor(pair_of(yarn.beta_fast)), 0)
    high = float(min(math.ceil(pair_of(yarn.beta_slow)), rope_dim - 1))
    if high == low:
        high += 0.001
    ramp = (np.arange(rope_dim // 2, dtype=np.float32) - low) / np.float32(high - low)
    return 1 - np.clip(ramp, 0, 1)

"""mHC's `pre` on Hopper in two launches: partial products (project_sm90.py), then everything else (finish_sm90.py).

Bound: (2 n + 2) m D bytes / 3.35 TB/s, if the second launch finds the streams in the L2 cache: up to some 1000 tokens
of 4 x 4096. Beyond, it reads them again: (4 n + 2) m D. On an H100, 4 x 4096 wide: 8.5 us for one token, 11.8 for
128 (17 % of that limit; both launches are latency), 121 for 4096 (42 %).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.formats import QuantFormat
from pallas_kernels.hyper_connection import finish_sm90, project_sm90
from pallas_kernels.hyper_connection.finish_sm90 import Numbers
from pallas_kernels.hyper_connection.reference import Mix
from pallas_kernels.hyper_connection.tiling import BLOCKS, CHUNK, PreTiling, default_tiling


def pre(
    streams: jax.Array,
    fn: jax.Array,
    base: jax.Array,
    scale: jax.Array,
    norm_weight: jax.Array,
    *,
    iterations: int,
    eps: float,
    norm_eps: float,
    form: QuantFormat | None = None,
    tiling: PreTiling | None = None,
) -> tuple[Any, ...]:
    """`reference.pre` of streams [.., 4, D] bfloat16 and fn [24, 4 D] float32; D is a multiple of 256."""
    *leading, n, width = streams.shape
    f = streams.reshape(-1, n * width)
    tiling = tiling or default_tiling(len(f))
    numbers = Numbers(iterations, eps, norm_eps)
    base, scale = base.astype(jnp.float32), scale.astype(jnp.float32)
    partials = project_sm90.project(f, fn, tiling, BLOCKS)
    of_tokens = f.reshape(len(f), n, width // CHUNK, CHUNK)
    x, post, comb, *codes = finish_sm90.finish(
        *partials, of_tokens, base, scale, norm_weight.reshape(-1, CHUNK), numbers, tiling, form
    )
    mix = Mix(post.reshape(*leading, n), comb.reshape(*leading, n, n))
    of_rows = () if form is None else (finish_sm90.of_rows(codes[0], codes[1], form),)
    return x.reshape(*leading, width), mix, *of_rows

"""The rows of a token's experts, added, on Hopper.

y[n] = sum_j rows[place[n, j]], in float32 and in the order of the token's experts. XLA gathers element by element. A
thread block is one warpgroup and has a part of one token: it loads that part of all rows at once, 16 bytes a thread.

Bound: (k + 1) N D values / 3.35 TB/s, and the latency of a launch and of two dependent loads. Measured within
whole layers alone, see kernel_sm90.py.
"""

# Pallas decorators turn functions into values: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAbstractUsage=false

from __future__ import annotations

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.mosaic.launch import compiler_params

PART = 1024  # columns of a thread block: eight a thread
WARPGROUP = 128


def combine(rows: jax.Array, place: jax.Array | np.ndarray) -> jax.Array:
    """[N, D] in the dtype of rows [P, D], for place int32 [N, k], which numpy has of one token; D a multiple of 128."""
    (tokens, k), width = place.shape, rows.shape[1]
    part = math.gcd(width, PART)
    layout = plgpu.Layout.WG_STRIDED((part,), vec_size=part // WARPGROUP)

    known = isinstance(place, np.ndarray)
    assert tokens == 1 or not known, f"places of {tokens} tokens are looked up"

    def kernel(rows_gmem, place_gmem, y_gmem):
        token, columns = lax.axis_index("token"), pl.ds(lax.axis_index("part") * part, part)
        places = place[0].tolist() if known else [place_gmem[token, j] for j in range(k)]
        loaded = [plgpu.load(rows_gmem.at[at, columns], layout=layout, optimized=False) for at in places]
        y_gmem[token, columns] = functools.reduce(jnp.add, (x.astype(jnp.float32) for x in loaded)).astype(rows.dtype)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((tokens, width), rows.dtype),
        grid=(tokens, width // part),
        grid_names=("token", "part"),
        compiler_params=compiler_params(unsafe_no_auto_barriers=True),
    )(rows, None if known else place)

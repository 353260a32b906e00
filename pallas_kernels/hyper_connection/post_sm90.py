"""mHC's `post` on Hopper: new stream j = post_j * out + sum_i comb[i, j] * stream_i, in float32.

A thread block is one warpgroup and has one token: its 20 coefficients are scalars, its streams and the sub-layer's
output are in registers, 8 neighbours a thread, all loads in flight at once. An SM holds several, which keep memory busy
while others compute; nothing goes through shared memory.

Bound: (4 n + 2) m D bytes / 3.35 TB/s. On an H100, 4 x 4096 wide: 2.1 us for one token, 5.3 for 128 (53 % of it), 103
for 4096 (87 %).
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hyper_connection.reference import Mix
from pallas_kernels.hyper_connection.tiling import CHUNK, STREAMS
from pallas_kernels.mosaic.launch import compiler_params
from pallas_kernels.quantize_rows.kernel_sm90 import registers


def post(streams: jax.Array, out: jax.Array, mix: Mix) -> jax.Array:
    """New streams [.., 4, D] in the dtype of streams, of out [.., D]; D is a multiple of 128."""
    groups = streams.shape[-1] // CHUNK
    layout = registers(groups)
    rows = streams.reshape(-1, STREAMS, groups, CHUNK)

    def kernel(streams_gmem, out_gmem, post_gmem, comb_gmem, y_gmem):
        token = lax.axis_index("token")

        def load(gmem: Any) -> jax.Array:
            return plgpu.load(gmem, layout=layout, optimized=False)

        old = [load(streams_gmem.at[token, i]) for i in range(STREAMS)]
        written = load(out_gmem.at[token])
        gates = [post_gmem[token, j] for j in range(STREAMS)]
        comb = [comb_gmem[token, i] for i in range(STREAMS * STREAMS)]
        for j in range(STREAMS):
            carried = [comb[i * STREAMS + j] * x.astype(jnp.float32) for i, x in enumerate(old)]
            new = gates[j] * written.astype(jnp.float32) + functools.reduce(jnp.add, carried)
            y_gmem[token, j] = new.astype(streams.dtype)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(rows.shape, streams.dtype),
        grid=(len(rows),),
        grid_names=("token",),
        # Threads share nothing.
        compiler_params=compiler_params(unsafe_no_auto_barriers=True),
    )(
        rows,
        out.reshape(-1, groups, CHUNK),
        mix.post.reshape(-1, STREAMS),
        mix.comb.reshape(-1, STREAMS * STREAMS),
    ).reshape(streams.shape)

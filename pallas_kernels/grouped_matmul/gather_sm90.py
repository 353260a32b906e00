"""Rows of codes to where their experts' blocks lie, on Hopper.

A thread block copies CHUNK rows in and out through shared memory by TMA; chunks of padding alone are skipped. There are
as many thread blocks as chunks, several to a multiprocessor: they wait for one another's copies, and nothing is
pipelined by hand. XLA's gather moves bytes one by one: 57344 rows of 4096 take it 280 us on an H100.

Bound: the rows that are real, once written, 3.35 TB/s; reads mostly hit the L2, which holds the codes of 4096 tokens.
Measured within whole layers alone, see kernel_sm90.py.
"""

# Pallas decorators turn functions into values: the checker cannot follow.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

CHUNK = 8
WIDE = 128  # bytes: of a line of shared memory


def gather(values: jax.Array, token: jax.Array) -> jax.Array:
    """Row token[p] of codes [N, K] for each of P rows, [P, K]; K a multiple of 128, P of CHUNK.

    Rows with a token of N are padding: they hold anything.
    """
    (tokens, k), rows = values.shape, len(token)
    assert (k % WIDE, rows % CHUNK) == (0, 0), f"{rows} rows of {k} codes"
    lines = k // WIDE

    def kernel(values_gmem, token_gmem, out_gmem, rows_smem, filled):
        first = lax.axis_index("chunk") * CHUNK

        @pl.when(token_gmem[first] < tokens)  # the rows of a block that are real come first
        def _copy():
            for i in range(CHUNK):
                source = jnp.minimum(token_gmem[first + i], tokens - 1)
                plgpu.copy_gmem_to_smem(values_gmem.at[source], rows_smem.at[i], filled)
            plgpu.barrier_wait(filled)
            plgpu.copy_smem_to_gmem(rows_smem, out_gmem.at[pl.ds(first, CHUNK)])
            plgpu.wait_smem_to_gmem(0)

    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows, lines, WIDE), values.dtype),
        grid=(rows // CHUNK,),
        grid_names=("chunk",),
        scratch_types={
            "rows_smem": plgpu.SMEM((CHUNK, lines, WIDE), values.dtype),
            "filled": plgpu.Barrier(num_arrivals=CHUNK),
        },
    )(values.reshape(tokens, lines, WIDE), token)
    return out.reshape(rows, k)

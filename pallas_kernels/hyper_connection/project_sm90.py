"""Products of the flattened streams with the mix projection on Hopper, in float32's precision by bfloat16 wgmmas.

    partial[p, t, o] = sum over the columns k of part p of f[t, k] fn[o, k],    squares[p, t] = sum of f[t, k]^2

f [m, K] is bfloat16. fn [24, K] is float32, the exact sum of three bfloat16 terms (8 of its 24 bits each), so that
three wgmmas with float32 sums lose nothing: TF32 would keep 11 bits. A thread block keeps the terms of its columns in
shared memory and meets tiles of 64 tokens: a producer copies [64, 128] chunks of them (TMA) into `stages` buffers, a
consumer multiplies, and squares what it reads meanwhile. Chunks are added in one order (in groups of eight),
whichever thread block has them: a token's bits depend neither on other tokens nor on their number.

Bound: 2 m K bytes / 3.35 TB/s; a chunk is 384 cycles of wgmma (three of 64 x 24 in 8 steps, each at least the 16 cycles
of reading 64 x 16), where 132 SMs wait some 1200 cycles for its 16 KB.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.pallas.mosaic_gpu.primitives import wgmma_accumulator_load

from pallas_kernels.block_matmul.kernel_sm90 import ROWS, swizzled
from pallas_kernels.hyper_connection.tiling import CHUNK, GROUP, MIXED, TILE, TMA_ROWS, PreTiling
from pallas_kernels.mosaic.launch import store_narrow
from pallas_kernels.quantize_rows.kernel_sm90 import registers

TERMS = 3  # bfloat16 terms of a float32
AT_ONCE = 4  # chunks of fn that are loaded before one is split: 96 registers
ROW = 32  # columns of a partial's row: MIXED, and no more than a warp has lanes


def scratch(tiling: PreTiling) -> dict[str, Any]:
    columns = tiling.chunks * CHUNK
    return {
        "chunk": plgpu.SMEM((tiling.stages, TILE, CHUNK), jnp.bfloat16, transforms=swizzled(2)),
        "fn": plgpu.SMEM((TERMS, MIXED, columns), jnp.bfloat16, transforms=swizzled(2)),
        "filled": plgpu.Barrier(num_arrivals=1, num_barriers=tiling.stages),
        "free": plgpu.Barrier(num_arrivals=1, num_barriers=tiling.stages),
    }


def partial_types(columns: int, tokens: int, tiling: PreTiling) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Of `partial` and `squares`: parts by groups, and rows of whole tiles, of which only the real mean anything."""
    each = GROUP // tiling.chunks
    shape = columns // (CHUNK * GROUP), each, -(-tokens // TILE) * TILE
    return jax.ShapeDtypeStruct((*shape, ROW), jnp.float32), jax.ShapeDtypeStruct(shape, jnp.float32)


def project(f: jax.Array, fn: jax.Array, tiling: PreTiling, blocks: int) -> tuple[jax.Array, jax.Array]:
    """partial [groups, each, padded, 32], 24 of them written, and squares [groups, each, padded], in a launch alone."""
    tokens, columns = f.shape
    parts, tiles = columns // (CHUNK * tiling.chunks), -(-tokens // TILE)
    sharing = max(1, min(blocks // parts, tiles))  # thread blocks that have the same columns

    def kernel(f_gmem, fn_gmem, partial_gmem, squares_gmem, **refs):
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        part, first = lax.rem(block, parts), lax.div(block, parts)
        each = tiles_of(first, sharing, tiles)
        pl.when(warpgroup == 1)(lambda: produce(each, part, f_gmem, refs, tiling))

        @pl.when(warpgroup == 0)
        def _multiply():
            split_terms(fn_gmem, refs["fn"], part * tiling.chunks, tiling.chunks)
            multiply(each, part, partial_gmem, squares_gmem, refs, tiling)

    return plgpu.kernel(
        kernel,
        out_type=partial_types(columns, tokens, tiling),
        grid=(parts * sharing,),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=scratch(tiling),
    )(whole_tiles(f), fn)


class Tiles(NamedTuple):
    """The tiles first, first + step .. of a thread block, `number` of them."""

    first: jax.Array
    step: int
    number: jax.Array

    def __call__(self, body: Callable[[Any, Any], None]) -> None:
        """Calls body(i, tile) for each."""
        pl.loop(0, self.number)(lambda i: body(i, self.first + i * self.step))


def tiles_of(first: jax.Array, step: int, tiles: int) -> Tiles:
    return Tiles(first, step, lax.div(tiles - first + step - 1, step))


def produce(each: Tiles, part: jax.Array, f_gmem: Any, refs: dict[str, Any], tiling: PreTiling) -> None:
    f_smem, filled, free = refs["chunk"], refs["filled"], refs["free"]
    chunks, stages = tiling.chunks, tiling.stages

    def tile_chunks(i, tile):
        @pl.loop(0, chunks)
        def _chunk(c):
            step = i * chunks + c
            slot = lax.rem(step, stages)
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            # Rows behind the last token come as zeros.
            columns = pl.ds((part * chunks + c) * CHUNK, CHUNK)
            plgpu.copy_gmem_to_smem(f_gmem.at[pl.ds(tile * TILE, TILE), columns], f_smem.at[slot], filled.at[slot])

    each(tile_chunks)
    # Every phase of a barrier that completes is observed.
    steps = each.number * chunks

    @pl.loop(0, stages)
    def _wait(i):
        step = steps - stages + i
        pl.when(step >= 0)(lambda: plgpu.barrier_wait(free.at[lax.rem(step, stages)]))


def multiply(
    tiles: Tiles,
    part: jax.Array,
    partial_gmem: Any,
    squares_gmem: Any,
    refs: dict[str, Any],
    tiling: PreTiling,
) -> None:
    """Writes the partials of every tile; the terms of fn are in shared memory."""
    f_smem, fn_smem, filled, free = (refs[name] for name in ("chunk", "fn", "filled", "free"))
    chunks, stages = tiling.chunks, tiling.stages

    def tile_sums(i, tile):
        def add_chunk(c, sums):
            slot = lax.rem(i * chunks + c, stages)
            plgpu.barrier_wait(filled.at[slot])

            def product(accumulator):
                for term in reversed(range(TERMS)):  # small ones first
                    columns = fn_smem.at[term, :, pl.ds(c * CHUNK, CHUNK)]
                    plgpu.wgmma(accumulator, f_smem.at[slot], columns.T)
                wide = plgpu.load(f_smem.at[slot], layout=plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)
                squares = jnp.sum(wide * wide, axis=1)
                return wgmma_accumulator_load(accumulator, wait_n=0), squares

            of_chunk = pl.run_scoped(product, plgpu.ACC((TILE, MIXED), jnp.float32))
            plgpu.commit_smem()
            plgpu.barrier_arrive(free.at[slot])
            return tuple(a + b for a, b in zip(sums, of_chunk, strict=True))

        zeros = (
            plgpu.layout_cast(jnp.zeros((TILE, MIXED), jnp.float32), plgpu.Layout.WGMMA),
            plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), ROWS),
        )
        product, squares = lax.fori_loop(0, chunks, add_chunk, zeros)
        each = GROUP // chunks
        group, of_group, tokens = lax.div(part, each), lax.rem(part, each), pl.ds(tile * TILE, TILE)
        store_narrow(partial_gmem, (group, of_group, tokens, pl.ds(0, MIXED)), product)  # rows of 96 bytes
        squares_gmem[group, of_group, tokens] = squares

    tiles(tile_sums)


def whole_tiles(f: jax.Array) -> jax.Array:
    """f [m, K] with zeros up to a multiple of the 8 rows that TMA copies at a time; fewer rows it takes as they are."""
    tokens = len(f)
    return f if tokens <= TMA_ROWS else jnp.pad(f, ((0, -tokens % TMA_ROWS), (0, 0)))


def split_terms(fn_gmem: Any, fn_smem: Any, first: Any, count: int) -> None:
    """`count` chunks of fn, from its chunk `first` on, as three bfloat16 terms, each of what the ones before it leave.

    Exact but for subnormal rests.
    """
    layout = registers(MIXED)
    for start in range(0, count, AT_ONCE):
        chunks = range(start, min(start + AT_ONCE, count))
        columns = [pl.ds((first + c) * CHUNK, CHUNK) for c in chunks]
        loaded = [plgpu.load(fn_gmem.at[:, at], layout=layout, optimized=False) for at in columns]
        for c, rest in zip(chunks, loaded, strict=True):
            for term in range(TERMS):
                rounded = rest.astype(jnp.bfloat16)
                fn_smem[term, :, pl.ds(c * CHUNK, CHUNK)] = rounded
                rest = rest - rounded.astype(jnp.float32)
    plgpu.commit_smem()

"""Matmul of bfloat16 rows with FP8 weights on Hopper: y[m, n] = sum_k x[m, k] (sw[n, k] w[n, k]), for any m.

Transposed, as in decode_sm90.py: 64 weight rows are wgmma's M, the tokens its N. Codes E4M3 or E5M2 become bfloat16 in
registers, which wgmma reads its first operand from: they are exact there, and nothing is written back to memory. A
scale that is a power of two (UE8M0 of 128 x 128 blocks) multiplies the converted codes, exactly, and one accumulator
sums all of K; a float32 scale multiplies the float32 sums of its block, which are added in K order; scales of whole
rows multiply finished sums. Persistent thread blocks take `tokens` x (64 x warpgroups) results:

- the producer copies `depth` columns of weights and x a stage, running ahead across tiles;
- a consumer has 64 weight rows. It issues the wgmmas of a stage, and while they run it loads and converts the codes of
  the next one.

Where there are few tiles, the thread blocks of a cluster share out K: split_k.py. A token's sum is the same whatever
other tokens are present, and the same for all tilings with as many shares.
Bound: few rows N K bytes / 3.35 TB/s and about 2 us of launch and latency, many 2 M N K / 989 TFLOP/s. A warp issues
some 290 instructions for 64 x 128 weights, 160 of them conversions of 64 codes a thread. A scheduler has 570 cycles for
them where all multiprocessors read at the speed of memory, and with 256 tokens 1024 for each of its two warps. An H200
measured, for 4096 -> 4096 and 1 / 128 / 4096 tokens, 8.8 / 14.5 / 167 us: 40 % of the bytes' limit, 30 and 83 % of the
FLOPs'.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.block_matmul.pipeline_sm90 import BLOCK, ROWS, WGMMA_ROWS, produce, swizzled
from pallas_kernels.block_matmul.split_k import AXIS, Shares, clusters
from pallas_kernels.block_matmul.weight_only_tiling import WeightOnly
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.scales import LEAST_BITS, NAN_BITS, NAN_CODE

CODES = plgpu.Layout.WGMMA_UPCAST_2X  # of 8-bit operands that become 16-bit ones
SUMS = plgpu.Layout.WGMMA


def matmul(
    x: jax.Array, w: jax.Array, w_scale: jax.Array, tiling: WeightOnly, out_dtype: DTypeLike = jnp.bfloat16
) -> jax.Array:
    """y [M, N] of x bfloat16 [M, G K], w [N, K] and w_scale [ceil(N/128), ceil(K/128)], uint8 (UE8M0) or float32.

    Or w_scale float32 [N], of whole rows. The N rows are in G groups, of which the g-th sees the g-th K columns of x.
    M is a multiple of the tile's tokens, N / G of its rows, K of its depth times shares; the depth is 128 where float32
    scales are of blocks. UE8M0: products with codes below 2^-133 leave bfloat16, the code 255 gives NaN.
    """
    (m, columns), (n, k) = x.shape, w.shape
    tokens, depth, stages, warpgroups = tiling.tokens, tiling.depth, tiling.stages, tiling.warpgroups
    groups, blocked, rows_each = columns // k, w_scale.ndim == 2, WGMMA_ROWS * warpgroups
    steps, tiles = k // depth // tiling.shares, (m // tokens, n // rows_each)  # steps: of a thread block
    launched = clusters(tiling.shares, tiles[0] * tiles[1])
    shares = Shares(tiling.shares, 1, WGMMA_ROWS, tokens, warpgroups, launched)
    rest = m % tokens, n // groups % rows_each, k % (depth * tiling.shares), columns % k
    assert rest == (0, 0, 0, 0), f"{(m, n, k)} in {groups} groups in tiles of {tiling}"
    folded = blocked and w_scale.dtype == jnp.uint8
    promoted = blocked and not folded
    assert depth == BLOCK or not promoted, f"{tiling}: a step is a block of float32 scales"
    accumulator_type = plgpu.ACC((WGMMA_ROWS, tokens), jnp.float32)

    def kernel(x_gmem, w_gmem, scale_gmem, y_gmem, *exchanged, **scratch):
        x_smem, w_smem, y_smem, filled, free = (scratch[name] for name in ("x", "w", "y", "filled", "free"))
        warpgroup = lax.axis_index("warpgroup")
        first_step = 0 if tiling.shares == 1 else lax.axis_index(AXIS) * steps
        loop = {"grid": (tiles[0] * tiles[1],), "collective_axes": "sm", "init_carry": jnp.int32(0)}

        def tile_of(info: plgpu.NDLoopInfo) -> tuple[jax.Array, jax.Array]:
            """First token and first weight row."""
            token, row = plgpu.planar_snake(info.index[0], tiles, 1, tiling.width)
            return token * tokens, row * rows_each

        @pl.when(warpgroup == warpgroups)
        def _produce():
            def copy(info, i, slot):
                (token, row), column = tile_of(info), (first_step + i) * depth
                source = w_gmem.at[pl.ds(row, rows_each), pl.ds(column, depth)]
                plgpu.copy_gmem_to_smem(source, w_smem.at[slot], filled.at[slot])
                of_group = lax.div(row, n // groups) * k if groups > 1 else 0
                source = x_gmem.at[pl.ds(token, tokens), pl.ds(of_group + column, depth)]
                plgpu.copy_gmem_to_smem(source, x_smem.at[slot], filled.at[slot])

            produce(loop, steps, stages, free, copy)

        @pl.when(warpgroup < warpgroups)
        def consume():
            plgpu.set_max_registers(tiling.registers, action="increase")
            rows_smem = pl.ds(warpgroup * WGMMA_ROWS, WGMMA_ROWS)
            staged_smem = None if scratch["staged"] is None else scratch["staged"].at[warpgroup]

            @plgpu.nd_loop(**loop)
            def _tiles(info, carry):
                token, row = tile_of(info)
                row += warpgroup * WGMMA_ROWS

                def slot_of(i):
                    return lax.rem(carry + i, stages)

                def scale_of(i):
                    block = (first_step + jnp.minimum(i, steps - 1)) * depth // BLOCK
                    return scale_gmem[row // BLOCK, block] if blocked else ()

                def converted(i, scale):
                    """The weights of step i, once they are there."""
                    plgpu.barrier_wait(filled.at[slot_of(i)])
                    codes = plgpu.load(w_smem.at[slot_of(i), rows_smem], layout=CODES)
                    values = plgpu.layout_cast(codes, SUMS).astype(jnp.float32).astype(jnp.bfloat16)
                    return values * _power(scale, values.shape) if folded else values

                def issue(accumulator, i, values):
                    _multiply(accumulator, values, x_smem.at[slot_of(i)].T, staged_smem)

                def release(i):
                    plgpu.commit_smem()  # this warpgroup has read the buffers, and not only through wgmma
                    plgpu.barrier_arrive(free.at[slot_of(i)])

                def overlapped(accumulator, i, values, scale):
                    """Multiplies step i, converts the weights of the next one meanwhile."""
                    issue(accumulator, i, values)
                    following = converted(i + 1, scale)
                    plgpu.wgmma_wait(0)
                    # Both are alive here: registers that wgmma reads are not to be written before it has ended.
                    _, following = lax.optimization_barrier((values, following))
                    release(i)
                    return following

                def last(accumulator, values):
                    issue(accumulator, steps - 1, values)
                    sums = accumulator[...]
                    release(steps - 1)
                    return sums

                def of_all(accumulator):
                    def step(i, state):
                        scale, values = state
                        return scale_of(i + 2), overlapped(accumulator, i, values, scale)

                    state = scale_of(1), converted(0, scale_of(0))
                    _, values = lax.fori_loop(0, steps - 1, step, state)
                    return last(accumulator, values)

                def by_block():
                    def step(i, state):
                        (scale, next_scale), values, sums = state

                        def of_block(accumulator):
                            following = overlapped(accumulator, i, values, None)
                            return accumulator[...], following

                        product, values = pl.run_scoped(of_block, accumulator_type)
                        return (next_scale, scale_of(i + 2)), values, sums + product * scale

                    zero = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, tokens), jnp.float32), SUMS)
                    state = (scale_of(0), scale_of(1)), converted(0, None), zero
                    (scale, _), values, sums = lax.fori_loop(0, steps - 1, step, state)
                    return sums + pl.run_scoped(lambda acc: last(acc, values), accumulator_type) * scale

                sums = by_block() if promoted else pl.run_scoped(of_all, accumulator_type)

                def write(sums):
                    if not blocked:
                        of_rows = plgpu.load(scale_gmem.at[pl.ds(row, WGMMA_ROWS)], layout=ROWS, optimized=False)
                        sums = sums * lax.broadcast_in_dim(of_rows, sums.shape, [0])
                    y = sums.astype(out_dtype)
                    if y.dtype == jnp.float32:
                        y = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    y_smem.at[warpgroup].T[...] = y
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        y_smem.at[warpgroup], y_gmem.at[pl.ds(token, tokens), pl.ds(row, WGMMA_ROWS)]
                    )

                shares.add_up([sums], exchanged, scratch, lambda found: write(*found))
                return carry + steps

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    wide = min(depth, 128)
    in_w = plgpu.TilingTransform((8, wide)), plgpu.SwizzleTransform(wide)
    staged = plgpu.SMEM((warpgroups, WGMMA_ROWS, depth), x.dtype, transforms=swizzled(2))
    y, *_ = plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct((m, n), out_dtype), *shares.outputs()),
        grid=(launched,),
        grid_names=("sm",),
        **shares.launch(),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types={
            "x": plgpu.SMEM((stages, tokens, depth), x.dtype, transforms=swizzled(2)),
            "w": plgpu.SMEM((stages, rows_each, depth), w.dtype, transforms=in_w),
            "y": plgpu.SMEM((warpgroups, tokens, WGMMA_ROWS), out_dtype),
            "staged": staged if is_interpreted() else None,
            "filled": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
            **shares.scratch(),
        },
    )(x, w, w_scale)
    return y


def _power(code: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """bfloat16 [*shape] of one UE8M0 code: its exponent, but for 2^-127, which is subnormal, and NaN."""
    code = code.astype(jnp.int32)
    least = jnp.where(code == NAN_CODE, NAN_BITS >> 16, LEAST_BITS >> 16)
    bits = lax.broadcast_in_dim(jnp.maximum(code << 7, least), shape, [])
    return lax.bitcast_convert_type(plgpu.layout_cast(bits, SUMS).astype(jnp.uint16), jnp.bfloat16)


def _multiply(accumulator: Any, values: jax.Array, other_smem: Any, staged_smem: Any) -> None:
    """Issues accumulator += values @ other_smem, values from registers.

    The interpreter's wgmma reads memory only: there, and only there, staged_smem hands them on.
    """
    if is_interpreted():
        staged_smem[...] = values
        plgpu.commit_smem()
        plgpu.wgmma(accumulator, staged_smem, other_smem)
    else:
        plgpu.wgmma(accumulator, values, other_smem)

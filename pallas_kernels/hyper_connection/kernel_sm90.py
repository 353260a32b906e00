"""mHC's `pre` on Hopper in one launch.

Thread blocks form teams that have the same tiles of 64 tokens, each member a part of the columns. Warpgroups:
1. project (project_sm90.py): partial products and squares of its columns, for one tile after another;
2. one or two finish (finish_sm90.py): x of a token, of each tile a few tokens a thread block;
3. make coefficients (coefficients_sm90.py): `post` and `comb` of those tokens, 32 at once.
A team's members hand partials over in device memory: whoever has written a tile's says so at its semaphore. There are
no more thread blocks than multiprocessors, so that all run. No thread block loads more than `lag` tiles ahead of those
it has finished, so that finishers find their streams in the L2 cache.

The simulated GPU has no semaphores, and runs two launches.
Bound: (2 n + 2) m D bytes / 3.35 TB/s; from the L2 cache, 2 n m D bytes more.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hyper_connection import coefficients_sm90, project_sm90
from pallas_kernels.hyper_connection.coefficients_sm90 import Numbers, make_coefficients
from pallas_kernels.hyper_connection.finish_sm90 import finish
from pallas_kernels.hyper_connection.project_sm90 import partial_type, project, whole_tiles
from pallas_kernels.hyper_connection.reference import Mix
from pallas_kernels.hyper_connection.share_sm90 import Cut, cut, share
from pallas_kernels.hyper_connection.tiling import CHUNK, STREAMS, PreTiling, default_tiling
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.launch import sm_count

# Registers a thread of those who project, make coefficients and finish, by the number of warpgroups that finish.
PROJECT_REGISTERS, COEFFICIENT_REGISTERS, FINISH_REGISTERS = 104, 64, {2: 168, 1: 240}


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
    tiling: PreTiling | None = None,
) -> tuple[jax.Array, Mix]:
    """`reference.pre` of streams [.., 4, D] bfloat16 and fn [24, 4 D] float32; D is a multiple of 256."""
    *leading, n, width = streams.shape
    f = streams.reshape(-1, n * width)
    tiling = tiling or default_tiling(len(f))
    arguments = (
        whole_tiles(f), fn, f.reshape(len(f), n, width // CHUNK, CHUNK),
        base.astype(jnp.float32), scale.astype(jnp.float32), norm_weight.reshape(-1, CHUNK),
    )  # fmt: skip
    run = in_two_launches if is_interpreted() else in_one_launch
    x, post, comb = run(*arguments, Numbers(iterations, eps, norm_eps), tiling)
    return x.reshape(*leading, width), Mix(post.reshape(*leading, n), comb.reshape(*leading, n, n))


def out_types(tokens: int, width: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of x, post and comb."""
    return (
        jax.ShapeDtypeStruct((tokens, width // CHUNK, CHUNK), jnp.bfloat16),
        jax.ShapeDtypeStruct((tokens, STREAMS), jnp.float32),
        jax.ShapeDtypeStruct((tokens, STREAMS * STREAMS), jnp.float32),
    )


def in_one_launch(f, fn, streams, base, scale, norm_weight, numbers: Numbers, tiling: PreTiling) -> Any:
    tokens, _, groups, _ = streams.shape
    width = groups * CHUNK
    of, lag = cut(tokens, width, tiling, sm_count()), tiling.lag
    if of.blocks > sm_count():
        raise ValueError(f"{tiling} takes {of.blocks} thread blocks at {width} columns, and they wait for one another")
    if lag < (least := of.least_lag(tiling)):
        raise ValueError(f"{tiling} lags too little: at {width} columns and {tokens} tokens {least} tiles at least")

    def kernel(f_gmem, fn_gmem, streams_gmem, base_gmem, scale_gmem, norm_weight_gmem, *rest, ready, finished, **refs):
        x_gmem, post_gmem, comb_gmem, partial_gmem = rest
        of_block = share(of, lax.axis_index("block"))
        partials = pl.get_global(plgpu.SemaphoreType.REGULAR((of.tiles,)))
        warpgroup = lax.axis_index("warpgroup")

        def may_load(i):
            pl.when(i >= lag)(lambda: plgpu.barrier_wait(finished.at[lax.rem(i - lag, lag)]))

        def done(i):
            plgpu.semaphore_signal(partials.at[of_block.tile(i)], memory_scope="gpu")

        def announce(i):
            @pl.loop(of_block.tiles_begun(i), of_block.tiles_begun(i + 1))
            def _tile(j):
                tile = of_block.tile(j)
                plgpu.semaphore_wait(partials.at[tile], of.parts, decrement=False, memory_scope="gpu")
                plgpu.barrier_arrive(ready.at[lax.rem(j, lag)])

        def wait_for(i):
            @pl.loop(of_block.tiles_begun(i), of_block.tiles_begun(i + 1))
            def _tile(j):
                plgpu.barrier_wait(ready.at[lax.rem(j, lag)])

        def have_read(i):
            @pl.loop(of_block.tiles_finished(i), of_block.tiles_finished(i + 1))
            def _tile(j):
                plgpu.barrier_arrive(finished.at[lax.rem(j, lag)])

        @pl.when(warpgroup == 0)
        def _project():
            set_registers(PROJECT_REGISTERS, of)
            names = project_sm90.scratch(tiling)
            project(
                f_gmem, fn_gmem, partial_gmem, share=of_block, tiling=tiling, may_load=may_load, done=done,
                **{name: refs[name] for name in names},
            )  # fmt: skip

        @pl.when(warpgroup == 1)
        def _coefficients():
            set_registers(COEFFICIENT_REGISTERS, of)
            make_coefficients(
                base_gmem, scale_gmem, post_gmem, comb_gmem,
                share=of_block, columns=STREAMS * width, numbers=numbers, announce=announce,
                **{name: refs[name] for name in coefficients_sm90.scratch(1)},
            )  # fmt: skip

        @pl.when(warpgroup >= 2)
        def _finish():
            set_registers(FINISH_REGISTERS[of.finishers], of)
            finish(
                warpgroup - 2, partial_gmem, streams_gmem, base_gmem, scale_gmem, norm_weight_gmem, x_gmem,
                share=of_block, numbers=numbers,
                wait_for=wait_for, have_read=have_read,
                **{name: refs[name] for name in coefficients_sm90.scratch(1)},
            )  # fmt: skip

    return plgpu.kernel(
        kernel,
        out_type=(*out_types(tokens, width), partial_type(tokens, width, tiling)),
        grid=(of.blocks,),
        grid_names=("block",),
        num_threads=2 + of.finishers,
        thread_name="warpgroup",
        scratch_types={
            **project_sm90.scratch(tiling),
            **coefficients_sm90.scratch(of.finishers),
            "ready": plgpu.Barrier(num_arrivals=1, num_barriers=lag),
            "finished": plgpu.Barrier(num_arrivals=of.finishers, num_barriers=lag),
        },
    )(f, fn, streams, base, scale, norm_weight)[:3]


def set_registers(count: int, of: Cut) -> None:
    launched = 65536 // 128 // (2 + of.finishers) // 8 * 8
    plgpu.set_max_registers(count, action="increase" if count > launched else "decrease")


def in_two_launches(f, fn, streams, base, scale, norm_weight, numbers: Numbers, tiling: PreTiling) -> Any:
    """The same warpgroups for the simulated GPU: nobody waits for another thread block."""
    tokens, _, groups, _ = streams.shape
    of = cut(tokens, groups * CHUNK, tiling, sm_count())
    partial = first_launch(of, tiling, groups * CHUNK)(f, fn)
    return second_launch(of, numbers, groups * CHUNK)(partial, streams, base, scale, norm_weight)


def first_launch(of: Cut, tiling: PreTiling, width: int) -> Callable[..., Any]:
    def kernel(f_gmem, fn_gmem, partial_gmem, **refs):
        of_block = share(of, lax.axis_index("block"))
        project(f_gmem, fn_gmem, partial_gmem, share=of_block, tiling=tiling, may_load=nothing, done=nothing, **refs)

    return plgpu.kernel(
        kernel,
        out_type=partial_type(of.tokens, width, tiling),
        grid=(of.blocks,),
        grid_names=("block",),
        scratch_types=project_sm90.scratch(tiling),
    )


def second_launch(of: Cut, numbers: Numbers, width: int) -> Callable[..., Any]:
    def kernel(partial_gmem, streams_gmem, base_gmem, scale_gmem, norm_weight_gmem, *outs, **refs):
        x_gmem, post_gmem, comb_gmem = outs
        of_block = share(of, lax.axis_index("block"))
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 0)
        def _coefficients():
            make_coefficients(
                base_gmem, scale_gmem, post_gmem, comb_gmem,
                share=of_block, columns=STREAMS * width, numbers=numbers, announce=nothing, **refs,
            )  # fmt: skip

        @pl.when(warpgroup >= 1)
        def _finish():
            finish(
                warpgroup - 1, partial_gmem, streams_gmem, base_gmem, scale_gmem, norm_weight_gmem, x_gmem,
                share=of_block, numbers=numbers, wait_for=nothing, have_read=nothing, **refs,
            )  # fmt: skip

    return plgpu.kernel(
        kernel,
        out_type=out_types(of.tokens, width),
        grid=(of.blocks,),
        grid_names=("block",),
        num_threads=1 + of.finishers,
        thread_name="warpgroup",
        scratch_types=coefficients_sm90.scratch(of.finishers),
    )


def nothing(_: Any) -> None:
    pass

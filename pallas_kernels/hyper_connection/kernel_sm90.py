"""mHC's `pre` on Hopper in one launch.

Thread blocks form teams that have the same tiles of 64 tokens, each member a part of the columns. Warpgroups:
0. project (project_sm90.py): partial products and squares of its columns, for one tile after another;
1. make coefficients (coefficients_sm90.py): sums of the partials of a few tokens of each tile, their `post` and `comb`;
2, 3. finish (finish_sm90.py): those tokens' x; before, they split two thirds of the matrix for warpgroup 0.
4. where tokens are many, tells the others of partials (handover_sm90.py), which takes longer than a tile's products.
A team's members hand partials over in device memory (partials_sm90.py): whoever has written a tile's says so at its
semaphore. There are no more thread blocks than multiprocessors, so that all run. No thread block loads more than `lag`
tiles ahead of those it has finished, so that finishers find their streams in the L2 cache.
Few tokens' partials are words in memory that a launch before has cleared, and are there when they are not 0: that takes
one way through the L2 cache, a semaphore three, and XLA a copy for that. Warpgroup 1 then splits a third of the matrix,
so that warpgroup 0 sums squares meanwhile, and finishers have their streams in registers when a token's numbers come.

The simulated GPU has no semaphores, and runs two launches.
Bound: (2 n + 2) m D bytes over memory's bandwidth; from the L2 cache, 2 n m D bytes more. On an H200 (4.8 TB/s), 4 x
4096 wide: 5.7 us for one token and 9.0 for 128, chains of latencies, clearing words included; 73 for 4096 (49 % of that
limit). A tile takes 16000 cycles from its copy to its last token; with more of them under way (two warpgroups that
project, more buffers, a larger lag) it is slower, as finishers then, it seems, no longer find their streams in the L2
cache.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.formats import QuantFormat
from pallas_kernels.hyper_connection import codes_sm90, coefficients_sm90, finish_sm90, project_sm90
from pallas_kernels.hyper_connection.coefficients_sm90 import Numbers, make_coefficients
from pallas_kernels.hyper_connection.finish_sm90 import finish
from pallas_kernels.hyper_connection.handover_sm90 import Handover, Nothing, Unsaid
from pallas_kernels.hyper_connection.partials_sm90 import Partials, Words, groups_of
from pallas_kernels.hyper_connection.plan_sm90 import TELL_REGISTERS, Plan, out_types
from pallas_kernels.hyper_connection.project_sm90 import project, whole_tiles
from pallas_kernels.hyper_connection.reference import Mix
from pallas_kernels.hyper_connection.share_sm90 import Cut, cut, share
from pallas_kernels.hyper_connection.split_sm90 import split_terms
from pallas_kernels.hyper_connection.tiling import CHUNK, FINISHERS, STREAMS, PreTiling, by_words, default_tiling
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.mosaic.launch import compiler_params, sm_count
from pallas_kernels.mosaic.words import zeros
from pallas_kernels.quantize_rows.kernel_sm90 import quantize_rows

PROJECTS, MAKES, TELLS = 0, 1, 2 + FINISHERS  # warpgroups; between are those who finish
REGISTER_FILE, WARPGROUP = 65536, 128  # of a multiprocessor, and threads


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
    """`reference.pre` of streams [.., 4, D] bfloat16 and fn [24, 4 D] float32; D is a multiple of 256.

    Narrow streams' codes are made by a launch of their own.
    """
    *leading, n, width = streams.shape
    rows = streams.reshape(-1, n, width)
    tiling = tiling or default_tiling(len(rows), width, sm_count())
    run = in_two_launches if is_interpreted() else in_one_launch
    fused = form if form is not None and codes_sm90.takes(width) else None
    x, post, comb, *codes = run(
        whole_tiles(rows.reshape(-1, n * width)), fn, rows, base.astype(jnp.float32), scale.astype(jnp.float32),
        norm_weight, Numbers(iterations, eps, norm_eps), tiling, fused,
    )  # fmt: skip
    found = x.reshape(*leading, width), Mix(post.reshape(*leading, n), comb.reshape(*leading, n, n))
    if form is None:
        return found
    codes, stored = codes or quantize_rows(x, form=form)
    return *found, codes_sm90.of_rows(codes, stored, form)


def in_one_launch(f, fn, streams, base, scale, norm_weight, numbers: Numbers, tiling: PreTiling, form: Any) -> Any:
    tokens, _, width = streams.shape
    of = cut(tokens, width, tiling, sm_count())
    if of.blocks > sm_count():
        raise ValueError(f"{tiling} takes {of.blocks} thread blocks at {width} columns, and they wait for one another")
    if tiling.lag < (least := of.least_lag(tiling)):
        raise ValueError(f"{tiling} lags too little: at {width} columns and {tokens} tokens {least} tiles at least")
    return launched(Plan(of, width, numbers, tiling, form, compiler_params()), f, fn, streams, base, scale, norm_weight)


@functools.partial(jax.jit, static_argnums=0)  # so that nobody who differentiates looks inside, where words are written
def launched(plan: Plan, f, fn, streams, base, scale, norm_weight) -> Any:
    of, width, numbers, tiling, form, params = plan

    def kernel(f_gmem, fn_gmem, streams_gmem, base_gmem, scale_gmem, norm_weight_gmem, *others, **refs):
        of_block, warpgroup = share(of, lax.axis_index("block")), lax.axis_index("warpgroup")
        to_project, to_make, to_finish = plan.registers
        if plan.by_words:
            words_gmem, x_gmem, post_gmem, comb_gmem, *codes_gmem = others
            partials = Words(of_block, words_gmem, groups_of(width, tiling.units))
            handover = Unsaid(of_block, refs["stored"])
        else:
            x_gmem, post_gmem, comb_gmem, *codes_gmem, partial_gmem = others
            partials = Partials(of_block, partial_gmem, plan.ring)
            written = pl.get_global(plgpu.SemaphoreType.REGULAR((of.tiles,)))
            handover = Handover(of_block, written, refs["finished"], refs.get("stored"))

        def split(sharer: Any) -> None:
            split_terms(fn_gmem, refs["fn"], refs["split"], share=of_block, units=tiling.units, sharer=sharer)

        @pl.when(warpgroup == PROJECTS)
        def _project():
            take_registers(to_project, warpgroups)
            own = {name: refs[name] for name in project_sm90.scratch(tiling)}
            project(
                f_gmem, fn_gmem, partials,
                share=of_block, tiling=tiling, handover=handover, splits=not plan.by_words, **own,
            )  # fmt: skip

        @pl.when(warpgroup == MAKES)
        def _coefficients():
            take_registers(to_make, warpgroups)
            if plan.by_words:  # of few tokens there is nothing else to do yet
                split(jnp.int32(0))
            own = {name: refs[name] for name in coefficients_sm90.scratch(of)}
            make_coefficients(
                partials, base_gmem, scale_gmem, post_gmem, comb_gmem,
                share=of_block, columns=STREAMS * width, numbers=numbers, handover=handover, **own,
            )  # fmt: skip

        @pl.when((warpgroup > MAKES) & (warpgroup < TELLS))
        def _finish():
            take_registers(to_finish, warpgroups)
            finisher = warpgroup - MAKES - 1
            split(finisher + 1)
            own = {name: refs[name] for name in coefficients_sm90.scratch(of) | finish_sm90.scratch(width, tiling)}
            finish(
                finisher, streams_gmem, base_gmem, scale_gmem, norm_weight_gmem, (x_gmem, *codes_gmem),
                form=form, share=of_block, numbers=numbers, handover=handover, few=plan.by_words, **own,
            )  # fmt: skip

        if isinstance(handover, Handover) and tiling.teller:

            @pl.when(warpgroup == TELLS)
            def _tell():
                take_registers(TELL_REGISTERS, warpgroups)
                handover.tell_all()

    warpgroups = TELLS + tiling.teller
    outs, inputs = out_types(of.tokens, width, form), (f, fn, in_chunks(streams), base, scale, norm_weight)
    if plan.by_words:
        inputs += (jax.new_ref(zeros(Words.needed(of))),)
    else:
        outs += (Partials.type_of(of, width, tiling, plan.ring),)
    found = plgpu.kernel(
        kernel,
        out_type=outs,
        grid=(of.blocks,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=params,
        scratch_types=plan.scratch,
    )(*inputs)
    return found if plan.by_words else found[:-1]


def take_registers(count: int, warpgroups: int) -> None:
    """From what each thread starts with, the same for all."""
    first = REGISTER_FILE // (WARPGROUP * warpgroups) // 8 * 8
    plgpu.set_max_registers(count, action="decrease" if count < first else "increase")


def in_two_launches(f, fn, streams, base, scale, norm_weight, numbers: Numbers, tiling: PreTiling, form: Any) -> Any:
    """The same warpgroups for the simulated GPU: nobody waits for another thread block."""
    tokens, _, width = streams.shape
    of = cut(tokens, width, tiling, sm_count())
    partial = first_launch(of, width, tiling)(f, fn)
    return second_launch(of, width, numbers, tiling, form)(partial, in_chunks(streams), base, scale, norm_weight)


def in_chunks(streams: jax.Array) -> jax.Array:
    """[m, 4 D / 128, 128], which TMA copies a token of."""
    return streams.reshape(len(streams), -1, CHUNK)


def first_launch(of: Cut, width: int, tiling: PreTiling) -> Callable[..., Any]:
    def kernel(f_gmem, fn_gmem, partial_gmem, *, fn, split, **refs):
        of_block, warpgroup = share(of, lax.axis_index("block")), lax.axis_index("warpgroup")

        @pl.when(warpgroup == PROJECTS)
        def _project():
            project(
                f_gmem, fn_gmem, Partials(of_block, partial_gmem, of.most_tiles), fn=fn, split=split,
                share=of_block, tiling=tiling, handover=Nothing(), **refs,
            )  # fmt: skip

        @pl.when(warpgroup > PROJECTS)
        def _split():
            split_terms(fn_gmem, fn, split, share=of_block, units=tiling.units, sharer=warpgroup)

    return plgpu.kernel(
        kernel,
        out_type=Partials.type_of(of, width, tiling, of.most_tiles),
        grid=(of.blocks,),
        grid_names=("block",),
        num_threads=1 + FINISHERS,
        thread_name="warpgroup",
        scratch_types=project_sm90.scratch(tiling),
    )


def second_launch(
    of: Cut, width: int, numbers: Numbers, tiling: PreTiling, form: QuantFormat | None
) -> Callable[..., Any]:
    def kernel(partial_gmem, streams_gmem, base_gmem, scale_gmem, norm_weight_gmem, *outs, **refs):
        x_gmem, post_gmem, comb_gmem, *codes_gmem = outs
        to_make = {name: refs[name] for name in coefficients_sm90.scratch(of)}
        of_block, warpgroup = share(of, lax.axis_index("block")), lax.axis_index("warpgroup")

        @pl.when(warpgroup == 0)
        def _coefficients():
            make_coefficients(
                Partials(of_block, partial_gmem, of.most_tiles), base_gmem, scale_gmem, post_gmem, comb_gmem,
                share=of_block, columns=STREAMS * width, numbers=numbers, handover=Nothing(), **to_make,
            )  # fmt: skip

        @pl.when(warpgroup >= 1)
        def _finish():
            finish(
                warpgroup - 1, streams_gmem, base_gmem, scale_gmem, norm_weight_gmem, (x_gmem, *codes_gmem),
                form=form, share=of_block, numbers=numbers, handover=Nothing(),
                few=by_words(of.tokens, tiling), **refs,
            )  # fmt: skip

    return plgpu.kernel(
        kernel,
        out_type=out_types(of.tokens, width, form),
        grid=(of.blocks,),
        grid_names=("block",),
        num_threads=1 + FINISHERS,
        thread_name="warpgroup",
        scratch_types={**coefficients_sm90.scratch(of), **finish_sm90.scratch(width, tiling)},
    )

"""Sparse decode attention on Hopper whose entries stay FP8 in shared memory: 64 heads of one query, 512 channels.

    s[h, n] = scale q[h] . k[n],   out[h] = sum_n exp(s[h, n]) k[n] / (sum_n exp(s[h, n]) + exp(sink[h]))

As in `many`, two warpgroups score, every other block of 64 entries each, and two add weights times entries to half of
the channels; what weights are relative to, and how float16 takes entries of any size, is said there. Here blocks are
copied as they are stored, by cp.async, a block ahead, into a ring of four stages (stage_sm90.py), and both products
have entries as wgmma's first operand, which either makes float16 in its own registers:

- scorers: S^T = E q^T, entries as rows;
- adders: out^T = E^T w, channels as rows. Bytes of two entries side by side are one permutation away.

So no warpgroup waits for loads, no float16 entries pass through shared memory, and a scorer is well into its next block
when it needs its last one to be added. A block's stage is free again when it is added.

Bounds, for each 64 entries: 2 x 64 x 64 x 512 products, 2048 cycles of wgmma; 240 KB through shared memory, 1900
cycles; by the compiled code some 1300 instructions of a scoring warp and 330 of an adding one: 1960 of a scheduler.
Not run on a GPU yet: chosen by name alone ("sm90_staged").
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_matmul.tiling import launch_registers
from pallas_kernels.mosaic.interpreter import is_interpreted
from pallas_kernels.sparse_attention.many import columns_sm90 as columns
from pallas_kernels.sparse_attention.many import convert_sm90 as convert
from pallas_kernels.sparse_attention.many.add_sm90 import ADDERS
from pallas_kernels.sparse_attention.many.entries_sm90 import BLOCK, Layout, Named, Source
from pallas_kernels.sparse_attention.many.epilogue_sm90 import Whole
from pallas_kernels.sparse_attention.many.score_sm90 import SCORERS
from pallas_kernels.sparse_attention.staged import stage_sm90 as stage
from pallas_kernels.sparse_attention.staged.add_sm90 import add, prepare
from pallas_kernels.sparse_attention.staged.epilogue_sm90 import finish
from pallas_kernels.sparse_attention.staged.operands_sm90 import STEP
from pallas_kernels.sparse_attention.staged.place_sm90 import TILES
from pallas_kernels.sparse_attention.staged.score_sm90 import STAGES, observe, score
from pallas_kernels.sparse_attention.units_sm90 import HEADS, Unit, Units

WIDTH = 512
ADDER_REGISTERS = 176  # of these the compiler spills none, and lets products overlap
SCORER_REGISTERS = launch_registers(SCORERS + ADDERS) // SCORERS - ADDER_REGISTERS * ADDERS // SCORERS


def attend(
    q: jax.Array,
    sources: Sequence[tuple[Layout, Source]],
    sink: jax.Array | None,
    factors: jax.Array | None,
    *,
    tokens: int,
    scale: float,
    splits: int = 1,
    turned_from: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """out [N, H, 512] bfloat16 and lse float32 [N, H] of q bfloat16 [N, H, 512]; see `many.kernel_sm90.attend`.

    Entries are 448 codes and 64 bfloat16 channels.
    """
    units, width = Units.of(q, splits), q.shape[-1]
    layouts, held = [layout for layout, _ in sources], [source for _, source in sources]
    assert width == WIDTH, f"{width} channels"
    assert all(stage.takes(layout.parts) for layout in layouts), f"entries of {[layout.parts for layout in layouts]}"

    def kernel(q_gmem, sources_gmem, sink_gmem, factors_gmem, out_gmem, lse_gmem, *, per_head, **scratch):
        # What products with q are to be multiplied by, the reference of logits, and what sums fade by.
        scratch |= {"measure": per_head.at[0], "top": per_head.at[1], "fade": per_head.at[pl.ds(2, SCORERS)]}
        whole = Whole(sink_gmem, factors_gmem, turned_from) if splits == 1 else Whole(None, None, turned_from)
        warpgroup = lax.axis_index("warpgroup")

        def unit(index: jax.Array) -> tuple[Unit, Named]:
            at = units[index]
            return at, Named(layouts, sources_gmem, at.query, tokens, at.split, splits)

        @pl.when(warpgroup < SCORERS)
        def _score():
            plgpu.set_max_registers(SCORER_REGISTERS, action="decrease")

            @plgpu.nd_loop(**units.loop, init_carry=(jnp.int32(0), jnp.int32(0)))
            def counts(info, carry):
                before, observed = carry
                _, named = unit(info.index[0])
                observed = score(named, scratch, warpgroup, before, observed)
                plgpu.barrier_arrive(scratch["summed"])
                return before + named.blocks, observed

            observe(scratch, counts[1], counts[0])

        @pl.when(warpgroup >= SCORERS)
        def _add():
            plgpu.set_max_registers(ADDER_REGISTERS, action="increase")
            me = warpgroup - SCORERS

            @plgpu.nd_loop(**units.loop, init_carry=jnp.int32(0))
            def _units(info, carry):
                before = carry
                at, named = unit(info.index[0])
                prepare(at, q_gmem, scratch, me, scale)
                sums = add(named, scratch, me, before)
                before = before + named.blocks
                last = lax.rem(before + SCORERS - 1, SCORERS)
                finish(at, named.blocks, last, sums, scratch, me, whole, out_gmem, lse_gmem)
                return before

    # There is no room for scratch of reductions, and nothing is reduced across warps.
    inputs, how = (lax.bitcast_convert_type(q, jnp.float16), held, sink, factors), {"reduction_scratch_bytes": 0}
    return units.launch(kernel, inputs, SCORERS + ADDERS, scratch_types(), q.dtype, **how)


def scratch_types() -> dict[str, object]:
    """Shared memory of a thread block: 226 KB of 227."""
    # wgmma takes its second operand in groups of so many rows as a swizzle has elements.
    swizzled = plgpu.TilingTransform((8, STEP)), plgpu.SwizzleTransform(2 * STEP)
    narrow = plgpu.TilingTransform((8, convert.HALF)), plgpu.SwizzleTransform(64)
    simulated: dict[str, object] = (
        {"logits": plgpu.SMEM((SCORERS, BLOCK, HEADS), jnp.float32)} if is_interpreted() else {}
    )
    return simulated | {
        "q": plgpu.SMEM((ADDERS, HEADS, WIDTH // ADDERS), jnp.float16, transforms=narrow),
        "stages": plgpu.SMEM((STAGES, BLOCK, stage.ROW_WORDS), jnp.int32),
        "factors": plgpu.SMEM((STAGES, TILES, BLOCK), jnp.float16),  # of codes
        "weights": plgpu.SMEM((1, BLOCK, HEADS), jnp.float16, transforms=swizzled),
        "per_head": plgpu.SMEM((2 + SCORERS, HEADS), jnp.float32),
        "raised": plgpu.SMEM((SCORERS,), jnp.int32),  # whether a block has raised the reference
        "slots": plgpu.SMEM((SCORERS, 2, BLOCK), jnp.int32),  # where a scorer's block lies, and its next one
        "maxima": plgpu.SMEM((1, columns.WARPS, HEADS), jnp.float32),
        "sums": plgpu.SMEM((SCORERS, columns.WARPS, HEADS), jnp.float32),
        "asked": plgpu.Barrier(num_arrivals=ADDERS),  # q has come
        "prepared": plgpu.Barrier(num_arrivals=ADDERS),  # and is float16
        "added": plgpu.Barrier(num_arrivals=ADDERS, num_barriers=STAGES),
        "topped": plgpu.Barrier(num_arrivals=1, num_barriers=SCORERS),  # the reference is the other scorer's
        "scored": plgpu.Barrier(num_arrivals=1, num_barriers=SCORERS),
        "summed": plgpu.Barrier(num_arrivals=SCORERS),
    }

"""Sparse decode attention on Hopper: 64 heads of one query over the entries that its indices name.

    s[h, n] = scale q[h] . k[n],   out[h] = sum_n exp(s[h, n]) k[n] / (sum_n exp(s[h, n]) + exp(sink[h]))

An entry is key and value at once, so that it is read, and made float16, once. One persistent thread block an SM takes
queries, in blocks of 64 entries. Four warpgroups:

- two score, every other block each (score_sm90.py). They load its entries from wherever they lie into registers, make
  them float16 there, put them into a buffer of shared memory, and multiply them with q straight from the registers:
  logits come out with a row an entry. Of these they make weights, which go to shared memory as well. Entries that are
  not seen are zeros and -inf in the logits, and are not read;
- two add (add_sm90.py): weights times entries of a block to half of the channels each, block after block, so that an
  accumulator of [64, 256] stays in registers; before, they make q float16, and at last divide by the sums of weights.

While one scorer makes weights the other converts, and the tensor cores have the adders' products besides.

float16 has the bits for weights that bfloat16 lacks, but not the range of entries. So entries are over powers of two of
their own, E[n] (see convert_sm90), which logits are multiplied by and weights take over: with t = log2(e) s, what
multiplies an entry is 2^(t[h, n] + log2 E[n] - M[h] + 7). The reference M[h] is the first block's maximum of
t + log2 E, and is raised only where one exceeds it by 8: then weights are still within float16, and sums that were
relative to the old one fade. Scorers take turns at M, in the order of blocks.

The order of a query's sums depends on its own entries and on how many queries there are.
Bounds, for each 64 entries: 2 x 64 x 64 x 512 products, 2048 cycles of wgmma, and 2760 of the way to shared memory and
the L1 cache; 900 instructions of a scoring warp. By counters of an H200, 128 queries of 4224 entries: 4480 cycles; of
twice that, a scorer waits some 1400 for a block's first words. Next to no register is spilled: local memory would share
an L1 cache of 28 KB with entries that stream through it (with 50 reloads a block 128 queries took 57 us).
Measured on an H200 (4.8 TB/s), 64 heads: 256 queries of 128 + 512 entries 70.4 us, 38 % of the bytes' limit (the kernel
for few 85.9, FlashMLA 89.9), 512 137; 128 queries of 128 heads, 128 + 1024, 106 us, 37 % of the FLOPs'. 128 queries
take 37.5 us, one 17.3: where multiprocessors have a query each or less, the kernel for few is faster (36.4, 7.7).
Of a scorer's 60 700 cycles for five blocks 17 000 convert and multiply, 9500 look up and ask, 5400 make weights, 6300
wait for q, the buffer or the reference; the rest, 4400 a block, are logits and rows that have not come. Whatever moves
work from one warpgroup to another ends at 37 to 38 us, or above: adders that find blocks to come and measure their
entries, for scorers that load the next block's first tiles before they sum weights, at 43 (174 for 512 queries).
Entries that stay FP8 in shared memory took 47 to 50; rows by TMA into the buffer that they are to fill 36 to 38, and
144 for 512 queries; rows staged as they are stored, for one who scores and two who convert and add, 35 to 41, and 134
to 158.
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
from pallas_kernels.sparse_attention.held_sm90 import TILE
from pallas_kernels.sparse_attention.many import columns_sm90 as columns
from pallas_kernels.sparse_attention.many import convert_sm90 as convert
from pallas_kernels.sparse_attention.many.add_sm90 import ADDERS, add, prepare
from pallas_kernels.sparse_attention.many.entries_sm90 import BLOCK, Layout, Named, Source
from pallas_kernels.sparse_attention.many.epilogue_sm90 import Whole, finish
from pallas_kernels.sparse_attention.many.score_sm90 import SCORERS, score
from pallas_kernels.sparse_attention.tiling import Division
from pallas_kernels.sparse_attention.units_sm90 import HEADS, Unit, Units, of_bits

ADDER_REGISTERS = 160
SCORER_REGISTERS = launch_registers(SCORERS + ADDERS) // SCORERS - ADDER_REGISTERS * ADDERS // SCORERS


def attend(
    q: jax.Array,
    sources: Sequence[tuple[Layout, Source]],
    sink: jax.Array | None,
    factors: jax.Array | None,
    *,
    tokens: int,
    scale: float,
    turned_from: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """out [N, H, K] bfloat16 and lse float32 [N, H] of q bfloat16 [N, H, K], N = B * tokens, H a multiple of 64.

    K is a multiple of 128. All sources have entries in the same format; their channels are those of their codes, filled
    up with zeros to a multiple of 64, and then of what is bfloat16, filled up to K. sink float32 [H], None for none.
    factors: see `turn_sm90.factors`, None where nothing is turned; channels before `turned_from` are not.
    """
    units, width = Units.of(q, Division()), q.shape[-1]
    layouts, held = [layout for layout, _ in sources], [source for _, source in sources]
    formats = {(layout.parts.tiles, layout.parts.tails) for layout in layouts}
    assert width % (ADDERS * TILE) == 0, f"{width} channels"
    assert len(formats) == 1 and sum(*formats) * TILE <= width, f"entries of {formats} tiles, {width} channels"

    def kernel(q_gmem, sources_gmem, sink_gmem, factors_gmem, out_gmem, lse_gmem, **scratch):
        whole = Whole(sink_gmem, factors_gmem, turned_from)
        warpgroup = lax.axis_index("warpgroup")

        def unit(index: jax.Array) -> tuple[Unit, Named]:
            at = units[index]
            return at, Named(layouts, sources_gmem, at.query, tokens)

        @pl.when(warpgroup < SCORERS)
        def _score():
            plgpu.set_max_registers(SCORER_REGISTERS, action="decrease")

            @plgpu.nd_loop(**units.loop)
            def _units(info):
                _, named = unit(info.index[0])
                score(named, scratch, warpgroup)
                plgpu.barrier_arrive(scratch["summed"])

            plgpu.barrier_wait(scratch["free"].at[warpgroup])  # every phase of a barrier is observed

        @pl.when(warpgroup >= SCORERS)
        def _add():
            plgpu.set_max_registers(ADDER_REGISTERS, action="increase")
            me = warpgroup - SCORERS
            for slot in range(SCORERS):
                plgpu.barrier_arrive(scratch["free"].at[slot])

            @plgpu.nd_loop(**units.loop)
            def _units(info):
                at, named = unit(info.index[0])
                prepare(at, named, q_gmem, scratch, me, scale)
                sums = add(named, scratch, me)
                finish(at, named.blocks, sums, scratch, me, whole, out_gmem, lse_gmem, layouts[0].parts.tiles)

            plgpu.wait_smem_to_gmem(0)

    # What is bfloat16 in device memory passes through shared memory that holds float16, as bits.
    inputs = lax.bitcast_convert_type(q, jnp.float16), held, sink, factors
    out, lse = units.launch(kernel, inputs, SCORERS + ADDERS, scratch_types(width), jnp.float16)
    return of_bits(out, q.dtype), lse


def scratch_types(width: int) -> dict[str, object]:
    """Shared memory of a thread block for `width` channels: 216 KB of 227 for 512."""
    swizzled = plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(128)
    narrow = plgpu.TilingTransform((8, convert.HALF)), plgpu.SwizzleTransform(64)
    half = width // ADDERS
    return {
        "q": plgpu.SMEM((ADDERS, HEADS, half), jnp.float16, transforms=narrow),
        "entries": plgpu.SMEM((SCORERS, ADDERS, BLOCK, half), jnp.float16, transforms=swizzled),
        "weights": plgpu.SMEM((SCORERS, BLOCK, HEADS), jnp.float16, transforms=swizzled),
        "measure": plgpu.SMEM((HEADS,), jnp.float32),  # what products with q are to be multiplied by
        "top": plgpu.SMEM((HEADS,), jnp.float32),  # the reference of logits
        "raised": plgpu.SMEM((SCORERS,), jnp.int32),  # whether a block has raised it, and what sums then fade by
        "fade": plgpu.SMEM((SCORERS, HEADS), jnp.float32),
        "slots": plgpu.SMEM((SCORERS, 2, BLOCK), jnp.int32),  # where a scorer's block lies, and its next one
        "maxima": plgpu.SMEM((SCORERS, columns.WARPS, HEADS), jnp.float32),
        "sums": plgpu.SMEM((SCORERS, columns.WARPS, HEADS), jnp.float32),
        "asked": plgpu.Barrier(num_arrivals=ADDERS),  # q has come
        "prepared": plgpu.Barrier(num_arrivals=ADDERS),  # and is float16
        "free": plgpu.Barrier(num_arrivals=ADDERS, num_barriers=SCORERS),
        "topped": plgpu.Barrier(num_arrivals=1, num_barriers=SCORERS),  # the reference is the other scorer's
        "scored": plgpu.Barrier(num_arrivals=1, num_barriers=SCORERS),
        "summed": plgpu.Barrier(num_arrivals=SCORERS),
    }

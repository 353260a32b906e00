"""Sparse decode attention on Hopper: 64 heads of one query, few entries a thread block; for many, see `many`.

    s[h, n] = scale q[h] . k[n],   out[h] = sum_n exp(s[h, n]) k[n] / (sum_n exp(s[h, n]) + exp(sink[h]))

An entry is key and value at once, so that it is read, and made float16, once. One persistent thread block an SM takes
queries, or parts of a query's entries where queries are few; blocks of 64 entries alternate between two buffers. Where
multiprocessors would have nothing to do, several take the same part, score all of it, and add a slice of the channels
each: what a thread block adds and stores of a part is most of what it takes for few entries. Four warpgroups:

- two gather, half of a block each: they load its entries from wherever they lie into registers, a block ahead, and put
  them into shared memory as wgmma wants them. Entries that are not seen are zeros there and -inf in the logits, and are
  not read. Names and pages are looked up three and two blocks ahead, whereupon the entries start for the L2 cache;
- two multiply. The first scores even blocks, the second odd ones (q k, the running maximum, which goes from one to the
  other, exp2, and its share of the sum), and leaves the weights in shared memory; both add weights times entries to
  half of the channels each, block after block, so that an accumulator of [64, 256] stays in registers. The block
  before one's own is added behind one's own products with q: before them, who scores next would wait for it; behind the
  weights, its buffer would be free half a turn later.

float16 has the bits for weights that bfloat16 lacks, but not the range of entries. So entries are over powers of two of
their own, E[n] (see convert_sm90), which logits are multiplied by and weights take over: with t = log2(e) s, what
multiplies an entry is 2^(t[h, n] + log2 E[n] - M[h] + 15), M the running maximum of t + log2 E.

The order of a query's sums depends on its own entries and on how many queries there are.
Bounds, for each 64 entries: 2048 cycles of wgmma, and 3340 of the way to shared memory and the L1 cache, of which
wgmma's operands take 1740, float16 entries and weights 690, loads from there 370, and gathered rows 540. By counters
of an H200, 128 queries of 4224 entries: 4820 cycles, 69 % of that bound.
Measured on an H200, combining included: one query of 128 + 512 entries, in ten parts of four slices, 7.7 us, of 128 +
8192, in 65 parts of two slices, 14.1: chains of latencies.
"""

# Pallas decorators turn functions into values, and its transforms look abstract: the checker cannot follow.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_matmul.tiling import launch_registers
from pallas_kernels.sparse_attention import convert_sm90 as convert
from pallas_kernels.sparse_attention import gather_sm90 as gather
from pallas_kernels.sparse_attention.entries_sm90 import BLOCK, Layout, Named, Source
from pallas_kernels.sparse_attention.epilogue_sm90 import Epilogue, Whole, finite
from pallas_kernels.sparse_attention.held_sm90 import TILE
from pallas_kernels.sparse_attention.products_sm90 import add_products
from pallas_kernels.sparse_attention.tiling import Division
from pallas_kernels.sparse_attention.units_sm90 import HEADS, PER_ENTRY, PER_HEAD, Unit, Units, of_bits
from pallas_kernels.sparse_attention.words_sm90 import LARGEST, LOG2_E

CONSUMERS = 2
GATHERERS = BLOCK // gather.ROWS
BUFFERS = CONSUMERS  # a consumer scores what lies in its own
CONSUMER_REGISTERS = 192
GATHER_REGISTERS = launch_registers(CONSUMERS + GATHERERS) // GATHERERS - CONSUMER_REGISTERS * CONSUMERS // GATHERERS
WHOLE = Division()
COLUMNS = 128  # of an accumulator: one instruction may not name more registers than a thread has at launch


def attend(
    q: jax.Array,
    sources: Sequence[tuple[Layout, Source]],
    sink: jax.Array | None,
    factors: jax.Array | None,
    *,
    tokens: int,
    scale: float,
    division: Division = WHOLE,
) -> tuple[jax.Array, jax.Array]:
    """out [N, H, K] bfloat16 and lse float32 [N, H] of q bfloat16 [N, H, K], N = B * tokens, H a multiple of 64.

    K is a multiple of 128. All sources have entries in the same format; their channels are those of their codes, filled
    up with zeros to a multiple of 64, and then of what is bfloat16, filled up to K. sink float32 [H], None for none.
    factors: see `turn_sm90.factors`, None where nothing is turned.
    division: among thread blocks. With several parts of a query's entries, results are those of each: out float32
    [parts, N, H, K] and lse [parts, N, H], without the sink.
    """
    units, width = Units.of(q, division), q.shape[-1]
    layouts, held = [layout for layout, _ in sources], [source for _, source in sources]
    half = width // CONSUMERS
    own = half // division.slices  # channels that a warpgroup adds
    each = math.gcd(own, COLUMNS)
    formats = {(layout.parts.tiles, layout.parts.tails) for layout in layouts}
    assert own % TILE == 0 and (division.slices == 1 or division.parts > 1), f"{width} channels in {division}"
    assert len(formats) == 1 and sum(*formats) * TILE <= width, f"entries of {formats} tiles, {width} channels"

    def kernel(q_gmem, sources_gmem, sink_gmem, factors_gmem, out_gmem, lse_gmem, **scratch):
        q_smem, entries_smem, weights_smem = (scratch[name] for name in ("q", "entries", "weights"))
        measures_smem, measure_smem = scratch["measures"], scratch["measure"]
        top_smem, fade_smem, sums_smem = (scratch[name] for name in ("top", "fade", "sums"))
        filled, free, scored = (scratch[name] for name in ("filled", "free", "scored"))
        warpgroup = lax.axis_index("warpgroup")
        whole = Whole(sink_gmem, factors_gmem) if division.parts == 1 else Whole(None, None)

        def unit(index: jax.Array) -> tuple[Unit, Named]:
            at = units[index]
            return at, Named(layouts, sources_gmem, at.query, tokens, at.part, division.parts)

        @pl.when(warpgroup >= CONSUMERS)
        def _gather():
            plgpu.set_max_registers(GATHER_REGISTERS, action="decrease")
            rows = pl.ds((warpgroup - CONSUMERS) * gather.ROWS, gather.ROWS)

            @plgpu.nd_loop(**units.loop)
            def _units(info):
                _, named = unit(info.index[0])

                def put(i, words, load, row):
                    """Block i into its buffer, as float16 and as multiples of powers of two of the entries' own."""
                    slot = lax.rem(i, BUFFERS)
                    with jax.named_scope("wait for the buffer"):
                        plgpu.barrier_wait(free.at[slot])
                    with jax.named_scope("convert"):
                        convert.put(words, load, row, entries_smem.at[slot], measures_smem.at[slot], rows)
                    with jax.named_scope("commit"):
                        plgpu.commit_smem()
                    plgpu.barrier_arrive(filled.at[slot])

                named.stream(warpgroup - CONSUMERS, put)

            for slot in range(BUFFERS):  # every phase of a barrier is observed
                plgpu.barrier_wait(free.at[slot])

        @pl.when(warpgroup < CONSUMERS)
        def _multiply():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            other = 1 - warpgroup
            for slot in range(BUFFERS):
                plgpu.barrier_arrive(free.at[slot])

            @plgpu.nd_loop(**units.loop, init_carry=jnp.int32(0))
            def _units(info, carry):
                at, named = unit(info.index[0])
                epilogue = Epilogue(at, whole, out_gmem, lse_gmem, q.dtype)
                columns, count = pl.ds(warpgroup * half, half), named.blocks
                place = at.slice * CONSUMERS + warpgroup  # of the channels that it adds
                asked = scratch["asked"]
                plgpu.copy_gmem_to_smem(q_gmem.at[at.query, at.heads, columns], q_smem.at[warpgroup], asked)

                def step(i, state):
                    """Block i, which lies in this warpgroup's buffer: its weights, to shared memory, and its sums.

                    The products of the block before it run behind those with q.
                    """
                    sums, top, total = state
                    with jax.named_scope("wait for entries"):
                        plgpu.barrier_wait(filled.at[warpgroup])
                    # Zero, and the buffer of this warpgroup: addresses that were the same for every block would be
                    # kept for all of them, in more registers than there are.
                    zero, slot = jnp.minimum(i, 0), lax.rem(i, BUFFERS)

                    def multiply(accumulator):
                        for half_of in range(CONSUMERS):
                            of_q, of_entries = q_smem.at[zero + half_of], entries_smem.at[slot, half_of]
                            plgpu.wgmma(accumulator, of_q, of_entries.T)
                        added = lax.fori_loop(0, jnp.minimum(i, 1), lambda _, sums: add(i - 1, 1 - slot, sums), sums)
                        return accumulator[...], added

                    def measures(j):
                        return plgpu.load(measures_smem.at[slot, j], layout=PER_ENTRY, optimized=False)

                    with jax.named_scope("multiply"):
                        logits, sums = pl.run_scoped(multiply, plgpu.ACC((HEADS, BLOCK), jnp.float32))
                    measure = plgpu.load(measure_smem.at[pl.ds(0, HEADS)], layout=PER_HEAD, optimized=False)
                    logits = logits * lax.broadcast_in_dim(measure, logits.shape, [0])
                    # Relative to the entries' own powers of two, as the entries are.
                    logits = logits * lax.broadcast_in_dim(measures(convert.POWER), logits.shape, [1])
                    logits = logits + lax.broadcast_in_dim(measures(convert.LOG), logits.shape, [1])
                    highest = jnp.max(logits, axis=1)

                    def of_other():
                        return plgpu.load(top_smem.at[other], layout=PER_HEAD, optimized=False)

                    before = lax.cond(i > 0, of_other, lambda: per_head(-jnp.inf))
                    new_top = jnp.maximum(before, highest)
                    top_smem[warpgroup] = new_top
                    shift = finite(new_top)
                    with jax.named_scope("weigh"):
                        weights = jnp.exp2(logits - lax.broadcast_in_dim(shift - LARGEST, logits.shape, [0]))
                        weights_smem[warpgroup] = weights.astype(jnp.float16)
                        fade_smem[warpgroup] = jnp.exp2(before - shift)
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(scored.at[warpgroup])
                    with jax.named_scope("sum"):
                        weights = weights * lax.broadcast_in_dim(measures(convert.INVERSE), weights.shape, [1])
                        total = total * jnp.exp2(top - shift) + jnp.sum(weights, axis=1)
                    return add(i, slot, sums), new_top, total

                def channels(slot):
                    """Of the entries in `slot`, what this warpgroup adds."""
                    if division.slices == 1:
                        return entries_smem.at[slot, warpgroup]
                    here = lax.div(place, division.slices), lax.rem(place, division.slices)
                    return entries_smem.at[slot, here[0], :, pl.ds(here[1] * own, own)]

                def fade(slot, sums):
                    fade = plgpu.load(fade_smem.at[slot], layout=PER_HEAD, optimized=False)
                    return [x * lax.broadcast_in_dim(fade, x.shape, [0]) for x in sums]

                def add(i, slot, sums):
                    """sums, faded, and the weights of block i, which is in `slot`, times its entries."""
                    with jax.named_scope("wait for weights"):
                        plgpu.barrier_wait(scored.at[slot])
                    with jax.named_scope("fade"):
                        sums = lax.fori_loop(0, jnp.minimum(i, 1), lambda _, sums: fade(slot, sums), sums)
                    with jax.named_scope("add"):
                        sums = add_products(sums, weights_smem.at[slot], channels(slot))
                    plgpu.barrier_arrive(free.at[slot])
                    return sums

                with jax.named_scope("load q"):
                    plgpu.barrier_wait(asked)
                with jax.named_scope("convert q"):
                    rows = pl.ds(warpgroup * gather.ROWS, gather.ROWS)
                    convert.convert_q(q_smem, measure_smem, rows, scale * LOG2_E)
                    plgpu.commit_smem()
                plgpu.barrier_arrive(scratch["prepared"])
                plgpu.barrier_wait(scratch["prepared"])
                zeros = plgpu.layout_cast(jnp.zeros((HEADS, each), jnp.float32), plgpu.Layout.WGMMA)
                state = [zeros] * (own // each), per_head(-jnp.inf), per_head(0.0)
                turns = lax.div(count - warpgroup + (BUFFERS - 1), BUFFERS)
                sums, top, total = lax.fori_loop(
                    0, turns, lambda turn, state: step(turn * BUFFERS + warpgroup, state), state
                )
                # The last block, if it is the other's.
                behind = (count > 0) & (lax.rem(count + BUFFERS - 1, BUFFERS) == other)
                sums = lax.fori_loop(0, behind.astype(jnp.int32), lambda _, sums: add(count - 1, other, sums), sums)

                sums_smem[carry, warpgroup, 0] = top
                sums_smem[carry, warpgroup, 1] = total
                plgpu.barrier_arrive(scratch["summed"])
                plgpu.barrier_wait(scratch["summed"])  # and nobody reads q any more
                tops, totals = (
                    [plgpu.load(sums_smem.at[carry, w, j], layout=PER_HEAD, optimized=False) for w in range(CONSUMERS)]
                    for j in range(2)
                )
                top = functools.reduce(jnp.maximum, tops)
                total = sum(x * jnp.exp2(t - finite(top)) for x, t in zip(totals, tops, strict=True))
                share, lse = epilogue.denominators(top, total)
                pl.when((warpgroup == 0) & (at.slice == 0))(lambda: epilogue.put_lse(lse))
                epilogue.put_all(sums, share, place * own, q_smem, warpgroup)
                return 1 - carry

            plgpu.wait_smem_to_gmem(0)

    swizzled = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    scratch_types = {
        "q": plgpu.SMEM((CONSUMERS, HEADS, half), jnp.float16, transforms=swizzled),
        "entries": plgpu.SMEM((BUFFERS, CONSUMERS, BLOCK, half), jnp.float16, transforms=swizzled),
        "weights": plgpu.SMEM((BUFFERS, HEADS, BLOCK), jnp.float16, transforms=swizzled),
        "measures": plgpu.SMEM((BUFFERS, 3, BLOCK), jnp.float32),
        "measure": plgpu.SMEM((HEADS,), jnp.float32),
        "top": plgpu.SMEM((BUFFERS, HEADS), jnp.float32),
        "fade": plgpu.SMEM((BUFFERS, HEADS), jnp.float32),
        "sums": plgpu.SMEM((2, CONSUMERS, 2, HEADS), jnp.float32),
        "asked": plgpu.Barrier(num_arrivals=CONSUMERS),
        "prepared": plgpu.Barrier(num_arrivals=CONSUMERS),
        "filled": plgpu.Barrier(num_arrivals=GATHERERS, num_barriers=BUFFERS),
        "free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=BUFFERS),
        "scored": plgpu.Barrier(num_arrivals=1, num_barriers=BUFFERS),
        "summed": plgpu.Barrier(num_arrivals=CONSUMERS),
    }
    # What is bfloat16 in device memory passes through shared memory that holds float16, as bits.
    inputs = lax.bitcast_convert_type(q, jnp.float16), held, sink, factors
    out, lse = units.launch(kernel, inputs, CONSUMERS + GATHERERS, scratch_types, jnp.float16)
    return of_bits(out, q.dtype), lse


def per_head(value: float) -> jax.Array:
    return plgpu.layout_cast(jnp.full((HEADS,), value, jnp.float32), PER_HEAD)

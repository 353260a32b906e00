"""A whole layer of FP8 or MXFP4 experts on Hopper: gather, gate and up with SwiGLU, re-quantise, down, combine.

Rows are laid out in blocks of one expert each, padded to whole blocks, so that a block reads one expert's weights,
writes where no other does, and no expert that was not hit is read. Of FP8 weights, few rows a block run on
block_matmul's decode kernel, many on its tiled one; of MXFP4 weights, all on fp4_sm90.py. The routing weight multiplies
before the second projection, whose input is rounded to 1x128 FP8 again; its rows are summed per token in float32, in
the order of the token's experts.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_matmul.decode_sm90 import few_rows
from pallas_kernels.block_matmul.kernel_sm90 import RowBlocks, many_rows
from pallas_kernels.block_matmul.tiling import FewRows, ManyRows
from pallas_kernels.formats import FP8_GROUP, QuantFormat
from pallas_kernels.grouped_matmul.fp4_sm90 import expert_rows
from pallas_kernels.grouped_matmul.layer import summed
from pallas_kernels.grouped_matmul.tiling import Mxfp4Rows
from pallas_kernels.mosaic.scales import scale_bytes
from pallas_kernels.quant import QuantTensor, quantize
from pallas_kernels.router import Routing


class Blocks(NamedTuple):
    """Where the routed rows lie: P = most blocks x rows a block.

    row_blocks: the experts of the blocks. place int32 [N, k]: the row of a token's choice. token int32 [P]: the token
    of a row, N where it is padding. factors float32 [P]: its routing weight, 0 where it is padding.
    """

    row_blocks: RowBlocks
    place: jax.Array
    token: jax.Array
    factors: jax.Array


def experts(
    x: jax.Array,
    w1: QuantTensor,
    w3: QuantTensor,
    w2: QuantTensor,
    routing: Routing,
    *,
    limit: float,
    rows: int,
    gate_up: FewRows | ManyRows | Mxfp4Rows,
    down: FewRows | ManyRows | Mxfp4Rows,
    activations: QuantFormat = FP8_GROUP,
) -> jax.Array:
    """Sum over its experts of weight * expert(token), [N, D] in x's dtype, for tokens x [N, D].

    w1, w3 [E, I, D] and w2 [E, D, I]: E4M3 in 128x128 blocks, or MXFP4 and tilings for it. rows: of a block, which is
    tile_m of a ManyRows tiling. limit: of the SwiGLU clamp, 0 for none. activations: E4M3 in 1x128 groups, with scales
    of the type of FP8 weights' ones.
    """
    blocks = lay_out(routing, rows)
    codes = quantize(x, activations)
    # Row N is padding: zeros, whose products are zeros.
    values, scale = (jnp.pad(part, ((0, 1), (0, 0))) for part in (codes.values, scale_bytes(codes.scale)))
    gathered = values[blocks.token], scale[blocks.token]

    def activate(gate, up, factor):
        if limit:
            gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        across = (0,) if isinstance(gate_up, ManyRows) else (1,)
        hidden = gate / (1 + jnp.exp(-gate)) * up
        return hidden * jax.lax.broadcast_in_dim(factor, hidden.shape, across)

    hidden = _multiply(*gathered, (w1, w3), gate_up, rows, x.dtype, blocks, epilogue=activate)
    again = quantize(hidden, activations)
    out = _multiply(again.values, scale_bytes(again.scale), (w2,), down, rows, x.dtype, blocks)
    return summed(out[blocks.place]).astype(x.dtype)


def lay_out(routing: Routing, rows: int) -> Blocks:
    """Blocks of `rows` rows for a routing of N tokens: at most N k / rows and one more for every expert."""
    tokens, k = routing.experts.shape
    count = len(routing.counts)
    most = tokens * k // rows + min(count, tokens * k)
    of_expert = -(-routing.counts // rows)
    last = jnp.cumsum(of_expert)
    expert = jnp.searchsorted(last, jnp.arange(most), side="right").astype(jnp.int32)
    row_blocks = RowBlocks(jnp.minimum(expert, count - 1), last[-1:].astype(jnp.int32))
    sorted_expert = routing.experts.reshape(-1)[routing.order]
    first_row = (last - of_expert) * rows - (jnp.cumsum(routing.counts) - routing.counts)
    of_sorted = (first_row[sorted_expert] + jnp.arange(tokens * k)).astype(jnp.int32)
    place = jnp.zeros(tokens * k, jnp.int32).at[routing.order].set(of_sorted)
    token = jnp.full(most * rows, tokens, jnp.int32).at[of_sorted].set(routing.order // k)
    factors = jnp.zeros(most * rows, jnp.float32).at[of_sorted].set(routing.weights.reshape(-1)[routing.order])
    return Blocks(row_blocks, place.reshape(tokens, k), token, factors)


def _multiply(values, scale, weights, tiling, rows, out_dtype, blocks: Blocks, epilogue=None) -> jax.Array:
    pairs = [(w.values, scale_bytes(w.scale)) for w in weights]
    how = {"out_dtype": out_dtype, "row_blocks": blocks.row_blocks}
    if epilogue is not None:
        how |= {"epilogue": epilogue, "factors": blocks.factors}
    if isinstance(tiling, Mxfp4Rows):
        return expert_rows(values, scale.T, pairs, tiling, rows=rows, **how)
    if isinstance(tiling, FewRows):
        return few_rows(values, scale.T, pairs, tiling, rows=rows, **how)
    assert tiling.tile_m == rows, f"a block of {rows} rows is a tile of {tiling}"
    return many_rows(values, scale, pairs, tiling, **how)

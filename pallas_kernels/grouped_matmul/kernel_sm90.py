"""A whole layer of FP8 or MXFP4 experts on Hopper: gather, gate and up with SwiGLU, re-quantise, down, combine.

Rows are laid out in blocks of one expert each, padded to whole blocks (lay_out_sm90.py), so that a block reads one
expert's weights, writes where no other does, and no expert that was not hit is read. Of FP8 weights, few rows a block
run on block_matmul's decode kernel, many on its tiled one; of MXFP4 weights, all on fp4_sm90.py. The routing weight
multiplies before the second projection, whose input is rounded to 1x128 FP8 again; its rows are summed per token in
float32, in the order of the token's experts. One token alone has kernels of its own (one_token_layer_sm90.py).

Bound: the weights of the experts that are hit, or their FLOPs. On an H200, 256 experts [2048, 4096], six a token, 1 /
16 / 128 / 4096 tokens: 47 / 484 / 1470 / 1996 us, 67 / 88 / 87 / 68 % of the bytes' limit, 0.97 to 1.09 of its two
products alone; MXFP4 33 / 274 / 784 / 2718, 51 / 82 / 87 / 27 %.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_matmul.decode_sm90 import few_rows
from pallas_kernels.block_matmul.kernel_sm90 import many_rows
from pallas_kernels.block_matmul.pipeline_sm90 import BLOCK
from pallas_kernels.block_matmul.results_sm90 import makes_codes
from pallas_kernels.block_matmul.tiling import FewRows, ManyRows
from pallas_kernels.formats import FP8_GROUP, QuantFormat
from pallas_kernels.grouped_matmul.activate import activate
from pallas_kernels.grouped_matmul.combine_sm90 import combine
from pallas_kernels.grouped_matmul.fp4_sm90 import expert_rows
from pallas_kernels.grouped_matmul.gather_sm90 import gather
from pallas_kernels.grouped_matmul.lay_out_sm90 import Blocks, lay_out
from pallas_kernels.grouped_matmul.rows_sm90 import quantized_rows
from pallas_kernels.grouped_matmul.tiling import Mxfp4Rows
from pallas_kernels.mosaic.scales import scale_bytes
from pallas_kernels.quant import QuantTensor
from pallas_kernels.quantize_rows import quantize_rows
from pallas_kernels.router import Routing


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

    w1, w3 [E, I, D] and w2 [E, D, I]: E4M3 in 128x128 blocks, or MXFP4 and tilings for it. rows: of a block, which are
    the `rows` of a ManyRows tiling. limit: of the SwiGLU clamp, 0 for none. activations: E4M3 in 1x128 groups, with
    scales of the type of FP8 weights' ones.
    """

    across = 0 if isinstance(gate_up, ManyRows) else 1  # the axis of tokens
    epilogue = functools.partial(activate, limit=limit, across=across)
    blocks = lay_out(routing, rows)
    multiply = functools.partial(_multiply, blocks=blocks, rows=rows)
    if isinstance(gate_up, Mxfp4Rows) and isinstance(down, Mxfp4Rows):
        quantise = functools.partial(_quantised, blocks=blocks, form=activations, rows=rows)
        # Where tiles have whole groups of channels, hidden rows are quantised by the kernel that they come from.
        at_once = x.dtype == jnp.bfloat16 and gate_up.rows % BLOCK == 0
        form = activations if at_once else x.dtype
        rows_of_x = quantise(x, gathered=True, folded=gate_up.folded)
        how = {"epilogue": epilogue, "next_folded": down.folded if at_once else None}
        made = multiply(*rows_of_x, (w1, w3), gate_up, form, **how)
        codes, scale = made if at_once else quantise(made, gathered=False, folded=down.folded)
        out = multiply(codes, scale, (w2,), down, x.dtype)
    else:
        if len(x) == 1 and isinstance(gate_up, FewRows):
            # Rows of padding are zeros, whose products are zeros.
            codes = quantize_rows(x, activations, padded_rows=rows, tokens_last=True)
            gathered = codes.values, scale_bytes(codes.scale)
        else:
            gathered = _gathered(x, blocks, activations)
        # Where a tile has whole groups of channels, hidden rows are quantised by the kernel that they come from.
        at_once = x.dtype == jnp.bfloat16 and isinstance(gate_up, ManyRows) and makes_codes(gate_up)
        made = multiply(*gathered, (w1, w3), gate_up, activations if at_once else x.dtype, epilogue=epilogue)
        if at_once:
            codes, scale = made
        else:
            again = quantize_rows(made, activations, tokens_last=isinstance(down, FewRows))
            codes, scale = again.values, scale_bytes(again.scale)
        out = multiply(codes, scale, (w2,), down, x.dtype)
    return combine(out, blocks.place)


def _gathered(x: jax.Array, blocks: Blocks, form: QuantFormat) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of tokens where their blocks are; rows of padding are any."""
    codes = quantize_rows(x, form)
    scale = scale_bytes(codes.scale)
    return gather(codes.values, blocks.token), scale[jnp.minimum(blocks.token, len(x) - 1)]


def _quantised(
    x: jax.Array, blocks: Blocks, form: QuantFormat, rows: int, *, gathered: bool, folded: bool
) -> tuple[jax.Array, jax.Array]:
    """The same for the MXFP4 kernel, of tokens [N, D] that are `gathered`, or of hidden rows [P, I]."""
    tokens = len(blocks.place)
    token = blocks.token[:rows] if gathered and tokens == 1 else blocks.token
    return quantized_rows(x, token, tokens, form, rows=rows, gathered=gathered, folded=folded)


def _multiply(
    values,
    scale,
    weights,
    tiling,
    out_dtype,
    *,
    blocks: Blocks,
    rows: int,
    epilogue=None,
    next_folded: bool | None = None,
) -> Any:
    pairs = [(w.values, scale_bytes(w.scale)) for w in weights]
    how = {"out_dtype": out_dtype, "row_blocks": blocks.row_blocks}
    if epilogue is not None:
        how |= {"epilogue": epilogue, "factors": blocks.factors}
    if isinstance(tiling, Mxfp4Rows):
        return expert_rows(values, scale, pairs, tiling, rows=rows, next_folded=next_folded, **how)
    if isinstance(tiling, FewRows):
        return few_rows(values, scale.T, pairs, tiling, rows=rows, **how)
    assert tiling.rows == rows, f"a block of {rows} rows is one of {tiling}"
    if epilogue is not None:
        how["factors"] = jnp.repeat(blocks.factors, len(blocks.token) // len(blocks.factors))
    return many_rows(values, scale, pairs, tiling, **how)

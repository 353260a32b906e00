"""How scorers hold the rows that they gather, as wgmma's first operand has them: a warp eight, and eight below."""

from __future__ import annotations

import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_kernels.sparse_attention.held_sm90 import WORDS, Held

ROWS = 64  # that a warpgroup holds at once
# Four neighbouring lanes a row: 16 bytes of a tile of codes each, or of either half of the rotary channels.
CODES = plgpu.Layout.TILED(plgpu.Tiling(((ROWS, WORDS), (16, WORDS), (8, WORDS), (4,))), (-7,), (-3, -2), -1)
TAIL = plgpu.Layout.TILED(
    plgpu.Tiling(((ROWS, 2 * WORDS), (16, 2 * WORDS), (8, 2 * WORDS), (16,), (4,))), (-8,), (-4, -2), -1
)
HELD = Held(ROWS, CODES, TAIL)
EACH_ROW = HELD.each_row

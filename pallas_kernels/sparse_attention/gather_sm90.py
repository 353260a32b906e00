"""How the kernel for few holds the rows that it gathers: a warp eight of them."""

from __future__ import annotations

import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_kernels.sparse_attention.held_sm90 import WORDS, Held

ROWS = 32  # that a warpgroup holds at once
# Four neighbouring lanes a row: 16 bytes of a tile of codes each, or of either half of the rotary channels.
CODES = plgpu.Layout.TILED(plgpu.Tiling(((ROWS, WORDS), (8, WORDS), (4,))), (-5,), (-3, -2), -1)
TAIL = plgpu.Layout.TILED(plgpu.Tiling(((ROWS, 2 * WORDS), (8, 2 * WORDS), (16,), (4,))), (-6,), (-4, -2), -1)
HELD = Held(ROWS, CODES, TAIL)
EACH_ROW = HELD.each_row

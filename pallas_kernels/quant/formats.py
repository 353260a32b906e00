"""What a block-quantised array looks like in memory: element type, packing, tile and scale type.

| format | values | codes per stored value | tile (rows, cols) | scale |
|---|---|---|---|---|
| FP8_BLOCK | E4M3, float8_e4m3fn [..., out, in] | 1 | 128 x 128 | UE8M0, float8_e8m0fnu |
| MXFP4 | E2M1, uint8 [..., out, in/2], low nibble first | 2 | 1 x 32 | UE8M0, float8_e8m0fnu |

One convention for all of them: `x ~ values * scale`. Tiles start at index 0; the last of an axis may be
partial.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class QuantFormat:
    """One format. Frozen and hashable, so that it can be static data of a pytree.

    values_dtype, scale_dtype: of the stored arrays. tile: logical elements (rows, columns of the last two
    axes) that share one scale. packing: codes in one stored value, along the last axis, lowest bits first.
    """

    name: str
    values_dtype: np.dtype
    tile: tuple[int, int]
    scale_dtype: np.dtype
    packing: int = 1

    def values_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored values of a logical `shape`; ValueError where codes do not fill a byte."""
        if len(shape) < 2 or shape[-1] % self.packing:
            raise ValueError(
                f"{self.name} cannot hold shape {shape}: it needs at least two axes, the last a multiple of "
                f"{self.packing} ({self.packing} codes a byte)"
            )
        return (*shape[:-1], shape[-1] // self.packing)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a logical `shape`: one a tile, partial tiles included."""
        return (*shape[:-2], -(-shape[-2] // self.tile[0]), -(-shape[-1] // self.tile[1]))


_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
FP8_BLOCK = QuantFormat("fp8_block", np.dtype(ml_dtypes.float8_e4m3fn), (128, 128), _E8M0)
MXFP4 = QuantFormat("mxfp4", np.dtype(np.uint8), (1, 32), _E8M0, packing=2)
FORMATS = {fmt.name: fmt for fmt in (FP8_BLOCK, MXFP4)}

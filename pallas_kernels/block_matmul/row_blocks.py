"""Rows of several experts in one product."""

from __future__ import annotations

from typing import NamedTuple

import jax


class RowBlocks(NamedTuple):
    """Rows in blocks of one expert each: expert int32 [most blocks], real int32 [1] of them hold rows."""

    expert: jax.Array
    real: jax.Array

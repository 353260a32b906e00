"""What one launch of mHC's `pre` on Hopper needs: its results, shared memory, registers, and words or semaphores."""

# Mosaic's Python is not typed for outsiders.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.formats import QuantFormat
from pallas_kernels.hyper_connection import codes_sm90, coefficients_sm90, finish_sm90, project_sm90
from pallas_kernels.hyper_connection.coefficients_sm90 import Numbers
from pallas_kernels.hyper_connection.share_sm90 import Cut
from pallas_kernels.hyper_connection.tiling import FINISHERS, STREAMS, PreTiling, by_words

# Registers a thread of those who project, make coefficients and finish: without a teller, and with one.
REGISTERS, TELL_REGISTERS = {False: (136, 80, 144), True: (136, 80, 120)}, 24
WORD_REGISTERS = 120, 96, 144  # where who makes coefficients has all words of a token on their way at once


def out_types(tokens: int, width: int, form: QuantFormat | None) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of x, post and comb, and of x's codes and their scales if there is a `form` for them."""
    return (
        jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((tokens, STREAMS), jnp.float32),
        jax.ShapeDtypeStruct((tokens, STREAMS * STREAMS), jnp.float32),
        *(() if form is None else codes_sm90.out_types(tokens, width, form)),
    )


class Plan(NamedTuple):
    """A call's sizes, numbers and form of codes, and how the device runs it."""

    of: Cut
    width: int
    numbers: Numbers
    tiling: PreTiling
    form: QuantFormat | None
    compiler_params: Any

    @property
    def by_words(self) -> bool:
        return by_words(self.of.tokens, self.tiling)

    @property
    def lag(self) -> int:
        """No more barriers than there is use for."""
        return min(self.tiling.lag, self.of.most_tiles)

    @property
    def ring(self) -> int:
        """Who loads a tile has finished the one `lag` before; that took everyone's partials, who by then had finished
        one another `lag` before.
        """
        return min(2 * self.tiling.lag, self.of.most_tiles)

    @property
    def registers(self) -> tuple[int, int, int]:
        return WORD_REGISTERS if self.by_words else REGISTERS[self.tiling.teller]

    @property
    def scratch(self) -> dict[str, Any]:
        finished = plgpu.Barrier(num_arrivals=FINISHERS, num_barriers=self.lag)
        stored = plgpu.Barrier(num_arrivals=1, num_barriers=self.lag)
        return {
            **project_sm90.scratch(self.tiling),
            **coefficients_sm90.scratch(self.of),
            **finish_sm90.scratch(self.width, self.tiling),
            **({} if self.by_words else {"finished": finished}),
            **({"stored": stored} if self.by_words or self.tiling.teller else {}),
        }

"""How a model is run: arithmetic, cache and implementation choices. Never what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsv4.config.model import require

Float = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Execution:
    """How to run a model.

    dtype: of activations and residual streams. cache_dtype: of cached entries, None for `dtype`.
    precision: of matrix products ("highest" keeps float32 exact on devices that would round it to TF32 or bf16).
    implementation: of every op ("auto", or a name `dsv4 doctor` lists); a named one runs or raises.
    prefill_chunk: tokens of a prompt processed at once, which bounds the memory of a prefill.
    remat: recompute each block in the backward pass instead of keeping its activations.
    """

    dtype: Float = "float32"
    cache_dtype: Float | None = None
    precision: Literal["default", "highest"] = "highest"
    implementation: str = "auto"
    prefill_chunk: int = 512
    remat: bool = False

    def __post_init__(self) -> None:
        require(self.dtype in ("float32", "bfloat16"), f"execution.dtype is {self.dtype!r}: float32 or bfloat16")
        require(
            self.cache_dtype in (None, "float32", "bfloat16"),
            f"execution.cache_dtype is {self.cache_dtype!r}: float32, bfloat16 or None",
        )
        require(
            self.precision in ("default", "highest"), f"execution.precision is {self.precision!r}: default or highest"
        )
        require(self.prefill_chunk >= 1, f"execution.prefill_chunk is {self.prefill_chunk}: it must be at least 1")

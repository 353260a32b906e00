"""How a model is run: arithmetic, cache and implementation choices. Never what it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dsv4.config.cache import CACHE_FORMATS, CacheFormat
from dsv4.config.errors import require
from pallas_kernels.formats import QuantFormat

Float = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Execution:
    """How to run a model.

    dtype: of activations and residual streams. activations: the format that the input of quantised dense and expert
    weights is rounded to (tiles of one row), None to leave it in `dtype`. cache: how cached entries and index keys are
    stored, None for `dtype`; every way through the model sees them as stored, the full pass included.
    precision: of matrix products ("highest" keeps float32 exact on devices that would round it to TF32 or bf16).
    implementation: of every op ("auto", or a name `dsv4 doctor` lists); a named one runs or raises.
    batch_invariant: in dense and expert products the bits of a token depend neither on the other tokens nor on their
    number; implementations that cannot promise it are passed over, and tilings that add in another order.
    prefill_chunk: tokens of a prompt processed at once, which bounds the memory of a prefill.
    remat: recompute each block in the backward pass instead of keeping its activations.
    """

    dtype: Float = "float32"
    activations: QuantFormat | None = None
    cache: CacheFormat | None = None
    precision: Literal["default", "highest"] = "highest"
    implementation: str = "auto"
    batch_invariant: bool = False
    prefill_chunk: int = 512
    remat: bool = False

    def __post_init__(self) -> None:
        require(self.dtype in ("float32", "bfloat16"), f"execution.dtype is {self.dtype!r}: float32 or bfloat16")
        require(
            self.activations is None or self.activations.tile[0] == 1,
            f"execution.activations is {self.activations and self.activations.name}: a tile must lie in one row, "
            "or a token's result would depend on the others in its batch",
        )
        require(
            self.precision in ("default", "highest"), f"execution.precision is {self.precision!r}: default or highest"
        )
        require(self.prefill_chunk >= 1, f"execution.prefill_chunk is {self.prefill_chunk}: it must be at least 1")

    @property
    def products(self) -> dict[str, Any]:
        """How weights are multiplied: keywords of `matmul` and `experts`."""
        return {"activations": self.activations, **self.exact_products}

    @property
    def exact_products(self) -> dict[str, Any]:
        """The same where the input is never rounded."""
        return {"implementation": self.implementation, "batch_invariant": self.batch_invariant}

    @property
    def cache_format(self) -> CacheFormat:
        """`cache`, or entries and keys kept as `dtype`."""
        return self.cache or CACHE_FORMATS["float32" if self.dtype == "float32" else "bf16"]

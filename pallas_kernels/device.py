"""What an implementation may ask about the device it would run on; `pretend` answers for another one.

"H100" and "TPU" here are kinds, not machines: an implementation decides from the platform and, on GPUs, the compute
capability.
"""

from __future__ import annotations

import contextlib
import contextvars
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax


@dataclass(frozen=True)
class Device:
    """platform: as jax calls it. capability: of a CUDA GPU, (9, 0) for Hopper; None elsewhere."""

    name: str
    platform: Literal["cpu", "gpu", "tpu"]
    capability: tuple[int, int] | None = None

    @property
    def has_fp8(self) -> bool:
        """FP8 tensor cores: Ada (8.9), Hopper, Blackwell."""
        return self.capability is not None and self.capability >= (8, 9)

    @property
    def has_int8(self) -> bool:
        """INT8 matrix units that XLA uses."""
        return self.platform == "tpu" or (self.capability is not None and self.capability >= (7, 5))

    @property
    def has_bfloat16(self) -> bool:
        """bfloat16 matrix units; elsewhere XLA widens each product to float32, which costs time and keeps rounding."""
        return self.platform == "tpu" or (self.capability is not None and self.capability >= (8, 0))

    @property
    def matmul_dtype(self) -> Literal["bfloat16", "float32"]:
        """What a reference, which multiplies in its input's dtype, is best given."""
        return "bfloat16" if self.has_bfloat16 else "float32"


# The kinds the project speaks of, by the name users know.
KINDS = {
    "T4": Device("T4", "gpu", (7, 5)),
    "L4 / RTX 4090": Device("L4 / RTX 4090", "gpu", (8, 9)),
    "A100": Device("A100", "gpu", (8, 0)),
    "RTX 3090": Device("RTX 3090", "gpu", (8, 6)),
    "H100 / H200": Device("H100 / H200", "gpu", (9, 0)),
    "B200": Device("B200", "gpu", (10, 0)),
    "TPU": Device("TPU", "tpu"),
    "CPU": Device("CPU", "cpu"),
}
_pretended: contextvars.ContextVar[Device | None] = contextvars.ContextVar("pretended device", default=None)


def default_device() -> Any:
    """The device that jax runs programs on by default."""
    chosen = jax.config.jax_default_device
    if chosen is None:
        return jax.local_devices()[0]
    return jax.local_devices(backend=chosen)[0] if isinstance(chosen, str) else chosen


def current() -> Device:
    """The device programs run on by default, or the one pretended."""
    if (pretended := _pretended.get()) is not None:
        return pretended
    device = default_device()
    if device.platform != "gpu":
        return Device(device.device_kind, device.platform if device.platform == "tpu" else "cpu")
    return Device(device.device_kind, "gpu", parse_capability(getattr(device, "compute_capability", "")))


def parse_capability(text: str) -> tuple[int, int] | None:
    """`9.0` -> (9, 0); None for what is no CUDA capability (`gfx942`)."""
    match = re.fullmatch(r"(\d+)\.(\d+)", str(text))
    return match and (int(match[1]), int(match[2]))


@contextlib.contextmanager
def pretend(device: Device) -> Iterator[None]:
    """Implementations are chosen as if for `device` while the block runs: for tables and tests, by tracing only."""
    token = _pretended.set(device)
    try:
        yield
    finally:
        _pretended.reset(token)

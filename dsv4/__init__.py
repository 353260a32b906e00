"""dsv4: a readable, exact, trainable DeepSeek-V4 in JAX.

    import dsv4
    model = dsv4.load()                           # a shipped model, a released checkpoint, or an orbax one
    logits = dsv4.forward(model, ids)             # [B, T, V] float32; trace=True shows every choice inside
    logits, cache = dsv4.prefill(model, ids)      # [B, V]
    logits, cache = dsv4.decode_step(model, tokens, cache)
    text = dsv4.generate(model, "In the beginning")

Importing this is free of jax; the names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4.api import init, load
    from dsv4.decoding.generate import generate
    from dsv4.decoding.run import decode_step, forward, prefill
    from dsv4.model.handle import Model

__version__ = "0.1.0"

_HOME = {
    "load": "dsv4.api",
    "init": "dsv4.api",
    "generate": "dsv4.decoding.generate",
    "forward": "dsv4.decoding.run",
    "prefill": "dsv4.decoding.run",
    "decode_step": "dsv4.decoding.run",
    "Model": "dsv4.model.handle",
}
__all__ = ["Model", "__version__", "decode_step", "forward", "generate", "init", "load", "prefill"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'dsv4' has no attribute {name!r}: it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__

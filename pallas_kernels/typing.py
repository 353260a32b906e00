"""Shape-checked public functions: checked when DSV4_TYPECHECK=1 (tests), plain annotations otherwise."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import cast


def typed[F: Callable[..., object]](function: F) -> F:
    """Checks a function's jaxtyping annotations with beartype when DSV4_TYPECHECK=1; costs nothing otherwise."""
    if os.environ.get("DSV4_TYPECHECK") != "1":
        return function
    from beartype import beartype
    from jaxtyping import jaxtyped

    return cast(F, jaxtyped(function, typechecker=beartype))

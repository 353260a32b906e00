"""What ops ask of their arrays before anything is traced: errors that name the operand, not a line deep inside."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def require_floats(**operands: Any) -> None:
    """Raises TypeError, naming the operand, for what is no jax or NumPy array, or one of other things than floats."""
    for name, x in operands.items():
        if not isinstance(x, jax.Array | np.ndarray):
            raise TypeError(f"{name} is a {type(x).__name__}: a jax or NumPy array of floats (jnp.asarray makes one)")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} is {x.dtype}: an array of floats, such as {name}.astype(jnp.float32)")


def require_plain_floats(**operands: Any) -> None:
    """`require_floats` of the operands that are arrays; of others, quantised ones or None, another knows."""
    require_floats(**{name: x for name, x in operands.items() if isinstance(x, jax.Array | np.ndarray)})


def require_shape(name: str, x: Any, shape: tuple[int, ...], why: str) -> None:
    """Raises ValueError, naming the operand and `why`, where x has another shape."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, not {shape}: {why}")

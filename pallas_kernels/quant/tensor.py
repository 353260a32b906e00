"""The quantised array every op takes.

Scales stay arrays of their own type (UE8M0: float8_e8m0fnu): the type goes through jit, device_put, indexing and orbax
unchanged, and keeps a scale from being taken for an integer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from pallas_kernels.formats import QuantFormat


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=["format"])
@dataclass(frozen=True)
class QuantTensor:
    """`x ~ values * scale`, a pytree whose leaves are the two stored arrays.

    values: codes as `format` stores them. scale: one element a tile. Leading axes (experts) are allowed. The
    fields may hold anything while a tree is mapped (shapes, shardings), so nothing is checked here: call
    `validate`.
    """

    values: Any
    scale: Any
    format: QuantFormat

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape, packing undone."""
        *leading, last = self.values.shape
        return (*leading, last * self.format.packing)

    @property
    def ndim(self) -> int:
        return len(self.values.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes stored, scales included."""
        return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in (self.values, self.scale))

    def validate(self) -> list[str]:
        """What is wrong with it, judged from shapes and dtypes alone; empty if nothing is."""
        fmt, problems = self.format, []
        for part, expected in (("values", fmt.values_dtype), ("scale", fmt.scale_dtype)):
            if (dtype := np.dtype(getattr(self, part).dtype)) != expected:
                problems.append(f"{part} are {dtype}, {fmt.name} stores {expected}")
        if self.ndim < 2:
            problems.append(f"values have shape {self.values.shape}, at least two axes are needed")
        elif reason := fmt.unsupported_reason(self.shape):
            problems.append(reason)
        elif tuple(self.scale.shape) != (expected := fmt.scale_shape(self.shape)):
            problems.append(f"scale has shape {self.scale.shape}, {fmt.name} of shape {self.shape} needs {expected}")
        return problems

    def require_valid(self, name: str | None = None) -> None:
        """Raises ValueError listing what `validate` finds, of the operand `name`."""
        if problems := self.validate():
            of = "" if name is None else f"{name} is "
            raise ValueError(f"{of}not a {self.format.name} tensor: {'; '.join(problems)}")

"""One leaf of a conversion: from the arrays that are stored to those that will be, and what that loses.

Experts go one matrix at a time: besides the leaf as it was read, only one of them is held in float32.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4.checkpoint.layout import StoredLeaf, StoredTensor
from dsv4.checkpoint.tree import assemble, part_of
from dsv4.config import ConfigError
from dsv4.config.recipe import Recipe
from dsv4.parameters import tensor_name
from dsv4.quantize.calibrate import Calibration
from dsv4.quantize.weights import quantize_leaf, weight_amax
from pallas_kernels.quant import QuantTensor, TreatedWeight, dequantize, mxfp4_to_fp8
from pallas_kernels.quant.hadamard import rotate_blocks

WORST = 10  # matrices of a leaf whose errors are kept


@dataclass
class LeafError:
    """Sums of squares over a leaf, of what was lost and of what there was, and (name, both) of its worst matrices."""

    lost: float = 0.0
    total: float = 0.0
    worst: list[tuple[str, float, float]] = field(default_factory=list)

    def add(self, name: str, lost: float, total: float) -> None:
        self.lost += lost
        self.total += total
        self.worst.append((name, lost, total))
        self.worst = sorted(self.worst, key=lambda entry: -relative(*entry[1:]))[:WORST]


def relative(lost: float, total: float) -> float:
    """rms(w - dequantised) / rms(w) from the two sums of squares; 0 for weights that are all 0."""
    return math.sqrt(lost / total) if total else 0.0


def copied(leaf: StoredLeaf, parts: dict[str, np.ndarray]) -> Iterator[tuple[StoredTensor, np.ndarray]]:
    """Every tensor of a leaf that stays as it is."""
    for tensor in leaf.tensors:
        array = parts[tensor.part]
        yield tensor, array if tensor.expert is None else array[tensor.expert]


def quantized(
    leaf: StoredLeaf, weight: np.ndarray, recipe: Recipe, calibration: Calibration | None, error: LeafError
) -> Iterator[tuple[StoredTensor, np.ndarray]]:
    """Every tensor of `leaf`, as it will be stored, from the float `weight`; adds to `error`."""
    name = tensor_name(leaf.path)
    known = calibration.get(name) if calibration else None
    scale, amax = (known.input_scale, known.channel_amax) if known else (None, None)
    if leaf.treatment and leaf.treatment.outliers and amax is None and weight.ndim > 2:
        amax = np.max([weight_amax(jnp.asarray(matrix)) for matrix in weight], axis=0)  # experts share their channels
    made: Any = None
    for expert, tensors in itertools.groupby(leaf.tensors, key=lambda tensor: tensor.expert):
        tensors = list(tensors)
        if expert is not None or made is None:
            matrix = jnp.asarray(weight if expert is None else weight[expert])
            made = quantize_leaf(name, leaf.spec, matrix, recipe, input_scale=scale, channel_amax=amax)
            error.add(tensors[0].name, *_squares(matrix, made))
        for tensor in tensors:
            yield tensor, np.asarray(part_of(made, tensor.part))


def exactly_fp8(
    leaf: StoredLeaf, stored: StoredLeaf, parts: dict[str, np.ndarray], error: LeafError
) -> Iterator[tuple[StoredTensor, np.ndarray]]:
    """Every tensor of `leaf` in FP8 blocks, from MXFP4 experts `stored` with `parts`, no value changed.

    Raises ConfigError naming the matrix that FP8 cannot hold.
    """
    for expert, tensors in itertools.groupby(leaf.tensors, key=lambda tensor: tensor.expert):
        tensors = list(tensors)
        packed = assemble(stored, {part: array if expert is None else array[expert] for part, array in parts.items()})
        try:
            made = mxfp4_to_fp8(packed, tensors[0].name)
        except ValueError as problem:
            raise ConfigError(str(problem)) from None
        error.add(tensors[0].name, 0.0, 0.0)
        for tensor in tensors:
            yield tensor, np.asarray(getattr(made, tensor.part))


def _squares(weight: jax.Array, made: Any) -> tuple[float, float]:
    lost, total = _row_squares(weight, made)
    return float(np.sum(np.asarray(lost), dtype=np.float64)), float(np.sum(np.asarray(total), dtype=np.float64))


@jax.jit
def _row_squares(weight: jax.Array, made: Any) -> tuple[jax.Array, jax.Array]:
    wide = weight.astype(jnp.float32)
    return jnp.sum((wide - as_multiplied(made)) ** 2, axis=-1), jnp.sum(wide**2, axis=-1)


def as_multiplied(made: QuantTensor | TreatedWeight) -> jax.Array:
    """The float32 weight [..., out, in] that a quantised one stands for, its treatment undone."""
    if isinstance(made, QuantTensor):
        return dequantize(made)
    weight = dequantize(made.weight)
    weight = rotate_blocks(weight) if made.rotated else weight  # the rotation is its own inverse
    return weight if made.channels is None else weight.at[..., made.channels].set(made.columns.astype(jnp.float32))

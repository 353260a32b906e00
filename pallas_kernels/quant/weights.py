"""What a linear layer multiplies by, and what is done to its input first.

A weight [..., out, in] is a plain array, a QuantTensor, or a TreatedWeight: one of the two with the treatments that
outliers call for. `x @ w.T` means the same for all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.formats import QuantFormat
from pallas_kernels.quant.convert import quantize, scaled
from pallas_kernels.quant.hadamard import rotate_blocks
from pallas_kernels.quant.tensor import QuantTensor


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "input_scale", "channels", "columns"],
    meta_fields=["rotated"],
)
@dataclasses.dataclass(frozen=True)
class TreatedWeight:
    """A weight whose input is treated before it is quantised.

    weight: [..., out, in] QuantTensor or array, 0 in the `channels`. input_scale: the static scale of the whole input
    [1, 1], None for scales computed from it. channels int32 [n]: input channels kept in 16 bits, whose `columns`
    [..., out, n] are multiplied apart. rotated: input and weight are Hadamard-rotated in blocks.
    """

    weight: Any
    input_scale: Any = None
    channels: Any = None
    columns: Any = None
    rotated: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=["name"])
@dataclasses.dataclass(frozen=True)
class ObservedWeight:
    """A weight that shows its input to whoever `observe`s while the program is traced; it multiplies as ever."""

    weight: Any
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)


Observation = tuple[str, jax.Array]
_observers: list[list[Observation]] = []


@contextlib.contextmanager
def observe() -> Iterator[list[Observation]]:
    """Collects (name, input) of every ObservedWeight used in the block; call it inside the function being traced."""
    seen: list[Observation] = []
    _observers.append(seen)
    try:
        yield seen
    finally:
        _observers.pop()


def shown(x: jax.Array, w: Any) -> Any:
    """The weight inside an ObservedWeight, `x` having been shown; any other weight as it is."""
    if not isinstance(w, ObservedWeight):
        return w
    for seen in _observers:
        seen.append((w.name, x))
    return w.weight


def dense_array(w: Any, dtype: DTypeLike) -> jax.Array:
    """An array or QuantTensor as an array of `dtype`."""
    return scaled(w, dtype) if isinstance(w, QuantTensor) else w.astype(dtype)


def treat(x: jax.Array, w: Any, activations: QuantFormat | None) -> tuple[jax.Array, Any, jax.Array | None]:
    """The definition of every treatment: (input as the weight sees it, weight, input of the 16-bit channels).

    The input of a weight that is quantised goes through `activations` and back, in a tile that is no wider than the
    input has channels; its dtype stays. Gradients pass the rounding straight through.
    """
    scale = kept = None
    if isinstance(w, TreatedWeight):
        scale = w.input_scale
        if w.channels is not None:
            kept = x[..., w.channels]
            x = x.at[..., w.channels].set(0)
        if w.rotated:
            x = rotate_blocks(x)
        w = w.weight
    if activations is not None and isinstance(w, QuantTensor):
        x = cast(jax.Array, _rounded(x, activations, scale))
    return x, w, kept


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _rounded(x: jax.Array, activations: QuantFormat, scale: jax.Array | None) -> jax.Array:
    return scaled(quantize_input(x, activations, scale), x.dtype).reshape(x.shape)


@_rounded.defjvp
def _rounded_jvp(activations: QuantFormat, primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    x, scale = primals
    return _rounded(x, activations, scale), tangents[0]


def require_quantised(**operands: Any) -> None:
    """Raises ValueError, naming the operand, for a quantised tensor whose leaves are not what its format says: kernels
    read them by address. Other operands pass.
    """
    for name, x in operands.items():
        x = x.weight if isinstance(x, ObservedWeight) else x
        x = x.weight if isinstance(x, TreatedWeight) else x
        if isinstance(x, QuantTensor):
            x.require_valid(name)


def require_rows_apart(w: Any, activations: QuantFormat | None) -> None:
    """That a row of w's input is rounded to codes that depend on no other row. Raises ValueError."""
    w = w.weight if isinstance(w, ObservedWeight) else w
    w, scale = (w.weight, w.input_scale) if isinstance(w, TreatedWeight) else (w, None)
    if activations is None or not isinstance(w, QuantTensor) or scale is not None or activations.tile[0] == 1:
        return
    raise ValueError(
        f"batch_invariant: a scale of {activations.name} activations is that of several rows: "
        "take tiles of one row, such as fp8_row or fp8_group, or a static scale"
    )


def quantize_input(
    x: jax.Array, activations: QuantFormat, scale: jax.Array | None, known: QuantTensor | None = None
) -> QuantTensor:
    """The rows of x [..., in] as [rows, in] codes: with scales of their own, or all with the static `scale`.

    known: what `quantize` gives for x in some format, which is taken if it is the one that is asked for.
    """
    rows = x.reshape(-1, x.shape[-1])
    if scale is None:
        form = fitted(activations, x.shape[-1])
        return known if known is not None and known.format == form else quantize(rows, form)
    return quantize(rows, dataclasses.replace(activations, tile=(None, None)), scale=scale)


def fitted(form: QuantFormat, columns: int) -> QuantFormat:
    """`form`, or with tiles as wide as the input where it has fewer channels than a tile."""
    rows, wide = form.tile
    return dataclasses.replace(form, tile=(rows, None)) if wide is not None and columns < wide else form


def embedding_rows(table: Any, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rows ids [...] of a table [V, D], plain or quantised: only they are read. ids lie in 0 .. V-1."""
    if not isinstance(table, QuantTensor):
        return jnp.take(table, ids, axis=0).astype(dtype)
    high = table.format.tile[0]
    tiles = ids * 0 if high is None else ids // high
    # A tensor [1, D] a row: one tile high whatever the format's tiles are.
    flat = QuantTensor(table.values[ids.reshape(-1)][:, None], table.scale[tiles.reshape(-1)][:, None], table.format)
    return scaled(flat, dtype).reshape(*ids.shape, table.shape[-1])

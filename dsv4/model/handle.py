"""A model as one value: its config, how to run it, and its parameters."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from dsv4.config import Execution, ModelConfig
from dsv4.model.transformer import Transformer, bind


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params",),
    meta_fields=("config", "execution", "tokenizer_path"),
)
@dataclasses.dataclass(frozen=True)
class Model:
    """A pytree whose leaves are the parameters, so that it passes through jit, grad and device_put as it is.

    params is a plain nested dict (dsv4.parameters names its leaves); weights may be QuantTensor.
    """

    config: ModelConfig
    params: dict[Any, Any]
    execution: Execution = Execution()
    tokenizer_path: str | None = None

    def bind(self) -> Transformer:
        """The Flax module with these parameters; call it inside jit."""
        return bind(self.config, self.execution, self.params)

    def replace(self, **changes: Any) -> Model:
        """A copy with fields changed, e.g. `model.replace(execution=Execution(dtype="bfloat16"))`."""
        return dataclasses.replace(self, **changes)

"""Where a model comes from: a checkpoint, or a config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from dsv4 import checkpoint
from dsv4.config import DEFAULT_MODEL, ConfigError, Execution, ModelConfig, execution_for, load_config
from dsv4.model.handle import Model
from dsv4.model.init import init_params

SHIPPED = Path(__file__).parent / "shipped"


def shipped() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))


def checkpoint_path(source: str | Path) -> Path:
    """The directory of a checkpoint: `source` itself, or a shipped model of that name. Raises ConfigError."""
    path = Path(source)
    if path.exists():
        return path
    if str(source) not in shipped():
        raise ConfigError(
            f"no checkpoint {str(source)!r}: give a directory, or a shipped model ({', '.join(shipped())})"
        )
    return SHIPPED / str(source)


def load(
    source: str | Path = DEFAULT_MODEL,
    *,
    execution: Execution | None = None,
    layers: range | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """A model from a shipped name, a released checkpoint directory, or an orbax one.

    execution: None runs a quantised checkpoint with the activations it was made for and an FP8 cache, any other in
    float32; `Execution()` dequantises weights, one op at a time, and rounds nothing else. layers: only these (released
    checkpoints), renumbered from 0, to study a piece of a model too large to hold.
    progress: called with (bytes read, bytes in all). Raises ConfigError or CheckpointError listing what is wrong.
    """
    path = checkpoint_path(source)
    if checkpoint.is_orbax(path):
        if layers is not None:
            raise ConfigError(f"layers={layers} needs a released checkpoint; {path} is an orbax one")
        config, params = checkpoint.restore(path)
    else:
        config, params = checkpoint.read(path, layers=layers, progress=progress)
    tokenizer = path / "tokenizer.json"
    execution = execution or execution_for(config.storage)
    return Model(config, params, execution, str(tokenizer) if tokenizer.is_file() else None)


def init(config: str | ModelConfig, *, seed: int = 0, execution: Execution | None = None) -> Model:
    """A model with fresh parameters, from a named config or a ModelConfig, in the dtype its release stores."""
    model_config = load_config(config).model if isinstance(config, str) else config
    params = init_params(model_config, jax.random.key(seed), jnp.dtype(model_config.storage.dtype))
    return Model(model_config, params, execution or Execution())

"""Frozen configs of three kinds, never mixed: what (model), how (execution), and how to train.

Nothing in this package imports jax, so that a command line can answer questions about a model at once.
"""

from dsv4.config.cache import CACHE_FORMATS, CacheFormat
from dsv4.config.errors import ConfigError
from dsv4.config.execution import Execution
from dsv4.config.model import (
    AttentionConfig,
    HyperConnectionConfig,
    IndexerConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    YarnConfig,
)
from dsv4.config.named import DEFAULT_MODEL, NamedConfig, load_config, names
from dsv4.config.overrides import apply_overrides, replace
from dsv4.config.recipe import RECIPES, Recipe, execution_for, find_recipe
from dsv4.config.released import read_released, write_released
from dsv4.config.storage import StorageConfig
from dsv4.config.training import TrainConfig

__all__ = [
    "CACHE_FORMATS",
    "AttentionConfig",
    "CacheFormat",
    "ConfigError",
    "DEFAULT_MODEL",
    "Execution",
    "HyperConnectionConfig",
    "IndexerConfig",
    "LayerConfig",
    "MoEConfig",
    "ModelConfig",
    "NamedConfig",
    "StorageConfig",
    "RECIPES",
    "Recipe",
    "TrainConfig",
    "YarnConfig",
    "apply_overrides",
    "execution_for",
    "find_recipe",
    "load_config",
    "names",
    "read_released",
    "replace",
    "write_released",
]

"""Whole-model number recipes: one small value that names a format per tensor class."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dsv4.config.cache import CACHE_FORMATS, CacheFormat
from dsv4.config.errors import ConfigError, require
from dsv4.config.execution import Execution
from dsv4.config.storage import StorageConfig
from pallas_kernels.formats import FORMATS, FP8_BLOCK, FP8_GROUP, MXFP4, QuantFormat, format_name


@dataclass(frozen=True)
class Recipe:
    """A format per tensor class, None for 16 bits. A recipe of your own is `dataclasses.replace` of one of RECIPES.

    dense, experts, embedding, head: weights. activations: the input of quantised dense and expert weights (that of
    `wo_a` excepted, as in the released code). cache: KV window, compressed KV and index keys. What the
    released code keeps in high precision (norms, router, mHC, sinks, compressors) has no field.
    outlier_channels: so many input channels of each dense and expert weight, the largest, stay in 16 bits.
    rotate: input channels of dense and expert weights are Hadamard-rotated before they are quantised.
    """

    name: str
    dense: QuantFormat | None = None
    experts: QuantFormat | None = None
    embedding: QuantFormat | None = None
    head: QuantFormat | None = None
    activations: QuantFormat | None = None
    cache: CacheFormat = CACHE_FORMATS["bf16"]
    outlier_channels: int = 0
    rotate: bool = False

    def __post_init__(self) -> None:
        require(bool(self.name), "recipe.name is empty")
        StorageConfig(**self._stored("bfloat16", static=False))  # its checks are this recipe's

    def storage(self, base: StorageConfig, *, static: bool = False) -> StorageConfig:
        """How a checkpoint stored like `base` is stored after this recipe; `static`: with scales of its inputs."""
        return StorageConfig(**self._stored(base.dtype, static))

    def execution(self, base: Execution) -> Execution:
        """`base` with this recipe's activations and cache."""
        return dataclasses.replace(base, activations=self.activations, cache=self.cache)

    def _stored(self, dtype: str, static: bool) -> dict:
        return {
            "dtype": dtype,
            **{name: format_name(getattr(self, name)) for name in ("dense", "experts", "embedding", "head")},
            "activations": format_name(self.activations),
            "rotate": self.rotate,
            "outlier_channels": self.outlier_channels,
            "static_activations": static,
        }


_FP8, _FP8_TENSOR, _INT8 = (CACHE_FORMATS[name] for name in ("fp8", "fp8_tensor", "int8"))
_FP8_ROW, _INT8_ROW = FORMATS["fp8_row"], FORMATS["int8_row"]
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("bf16"),
        # As released, with the index keys of Hopper deployments.
        Recipe("released", FP8_BLOCK, MXFP4, activations=FP8_GROUP, cache=_FP8),
        Recipe("fp8", FP8_BLOCK, FP8_BLOCK, activations=FP8_GROUP, cache=_FP8),
        # One scale a weight. Activations have one a token: one for a whole batch would let its tokens see each other.
        Recipe("fp8_per_tensor", FORMATS["fp8_tensor"], FORMATS["fp8_tensor"], activations=_FP8_ROW, cache=_FP8_TENSOR),
        Recipe("fp8_per_channel", _FP8_ROW, _FP8_ROW, activations=_FP8_ROW, cache=_FP8_TENSOR),
        Recipe("fp8_e5m2", FORMATS["e5m2"], FORMATS["e5m2"], activations=FORMATS["e5m2_group"], cache=_FP8),
        Recipe("int8", _INT8_ROW, _INT8_ROW, activations=_INT8_ROW, cache=_INT8),
        Recipe("int8_per_tensor", FORMATS["int8_tensor"], FORMATS["int8_tensor"], activations=_INT8_ROW, cache=_INT8),
        Recipe("mxfp4_experts", experts=MXFP4),
    )
}


def find_recipe(name: str) -> Recipe:
    """A recipe of RECIPES. Raises ConfigError listing them."""
    if name not in RECIPES:
        raise ConfigError(f"no recipe {name!r}: {', '.join(RECIPES)}")
    return RECIPES[name]


def execution_for(storage: StorageConfig, base: Execution | None = None) -> Execution:
    """How a checkpoint is run unless told otherwise: quantised weights with their activations and an FP8 cache."""
    base = base or Execution()
    if not storage.quantized:
        return base
    return dataclasses.replace(base, activations=storage.activation_format, cache=CACHE_FORMATS["fp8"])

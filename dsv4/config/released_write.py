"""Writes the released `config.json`, and refuses the models it cannot express."""

from __future__ import annotations

import copy
import json
import operator
import warnings
from pathlib import Path
from typing import Any

from dsv4.config.errors import ConfigError
from dsv4.config.layers import released_layer
from dsv4.config.model import LayerConfig, ModelConfig
from dsv4.config.released_keys import FIXED, KEYS, LAYER_TYPES, SECOND_NAMES, WRITTEN, section
from dsv4.config.released_storage import SECTION, storage_section


def write_released(config: ModelConfig, path: str | Path) -> None:
    """Writes `config` as a released config.json to the file `path`, atomically. Raises as `to_released`."""
    path = Path(path)
    text = json.dumps(to_released(config), indent=2) + "\n"
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def to_released(config: ModelConfig) -> dict[str, Any]:
    """The released config.json of `config`. Raises ConfigError for a model the released format cannot express."""
    if problems := _inexpressible(config):
        raise ConfigError(
            "the released format cannot express this model (a research setting): "
            + "; ".join(problems)
            + ". Keep it as an orbax checkpoint, or change those fields"
        )
    _warn_of_other_readers(config)
    quantized = config.storage.released and config.storage.dense == "fp8"
    absent = {"rope_scaling"} if config.attention.yarn is None else set()
    absent |= set() if quantized else {"quantization_config", "expert_dtype"}
    raw = copy.deepcopy(WRITTEN)
    for name in (*FIXED, *KEYS):
        if name in SECOND_NAMES or {name, section(name)} & absent:
            continue
        holder = raw.setdefault(section(name), {}) if section(name) else raw
        holder[name.rpartition(".")[2]] = copy.copy(FIXED[name]) if name in FIXED else _value(config, name)
    if not config.storage.released:
        raw[SECTION] = storage_section(config.storage)
    return raw | _schedule(config)


def _value(config: ModelConfig, name: str) -> Any:
    value = operator.attrgetter(KEYS[name].field)(config)
    # Strict readers want a fraction in the JSON even where the value is whole.
    return float(value) if KEYS[name].kind is float else value


def _schedule(config: ModelConfig) -> dict[str, Any]:
    schedule: dict[str, Any] = {
        "num_hidden_layers": len(config.layers),
        "compress_ratios": [layer.ratio for layer in config.layers] + [0] * config.mtp_blocks,
    }
    hca_ratios = {layer.ratio for layer in config.layers if layer.kind == "hca"}
    if len(hca_ratios) == 1 and hca_ratios != {128}:
        # Readers that look at layer_types instead of compress_ratios assume a ratio of 128 unless told.
        schedule["layer_types"] = [LAYER_TYPES[layer.kind] for layer in config.layers]
        schedule["compress_rates"] = {LAYER_TYPES["csa"]: 4, LAYER_TYPES["hca"]: hca_ratios.pop()}
    return schedule


def _inexpressible(config: ModelConfig) -> list[str]:
    problems = [f"layer {i} is {layer}" for i, layer in enumerate(config.layers) if not _expressible(layer)]
    problems += ["attention.sink is off"] if not config.attention.sink else []
    problems += [f"residual.kind is {config.residual.kind}"] if config.residual.kind != "hyper" else []
    problems += ["moe.experts is 0"] if not config.moe.experts else []
    problems += ["moe.shared is 0"] if not config.moe.shared else []
    problems += ["moe.swiglu_limit is 0 (write no clamp as 1e30)"] if not config.moe.swiglu_limit else []
    return problems


def _expressible(layer: LayerConfig) -> bool:
    return layer.kind != "full" and released_layer(layer.ratio) == layer


def _warn_of_other_readers(config: ModelConfig) -> None:
    """Settings that the released format has a key for, but another implementation is known to ignore."""
    ignored = [] if config.moe.normalize and config.moe.scoring != "softmax" else ["weights that are not renormalised"]
    ignored += [f"{config.moe.shared} shared experts (they assume 1)"] if config.moe.shared > 1 else []
    if ignored:
        warnings.warn(f"other implementations of deepseek_v4 ignore: {'; '.join(ignored)}", stacklevel=3)

"""The released `config.json`, both ways. A checkpoint's own file always wins over any named config.

Unknown keys are named in one warning; a missing, contradictory or unsupported one is an error that says which.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from dsv4.config.model import (
    AttentionConfig,
    ConfigError,
    HyperConnectionConfig,
    IndexerConfig,
    ModelConfig,
    MoEConfig,
    StorageConfig,
    YarnConfig,
)
from dsv4.config.overrides import released_layer

# Released key -> dotted field of ModelConfig, copied as it is.
PLAIN_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "max_position_embeddings": "max_context",
    "num_nextn_predict_layers": "mtp_blocks",
    "rms_norm_eps": "norm_eps",
    "initializer_range": "initializer_range",
    "bos_token_id": "bos_id",
    "eos_token_id": "eos_id",
    "num_attention_heads": "attention.heads",
    "head_dim": "attention.head_dim",
    "qk_rope_head_dim": "attention.rope_dim",
    "q_lora_rank": "attention.q_lora_rank",
    "o_groups": "attention.o_groups",
    "o_lora_rank": "attention.o_lora_rank",
    "sliding_window": "attention.window",
    "rope_theta": "attention.rope_theta",
    "compress_rope_theta": "attention.compress_rope_theta",
    "index_n_heads": "indexer.heads",
    "index_head_dim": "indexer.head_dim",
    "index_topk": "indexer.top_k",
    "n_routed_experts": "moe.experts",
    "num_experts_per_tok": "moe.per_token",
    "n_shared_experts": "moe.shared",
    "moe_intermediate_size": "moe.expert_width",
    "num_hash_layers": "moe.hash_layers",
    "scoring_func": "moe.scoring",
    "norm_topk_prob": "moe.normalize",
    "routed_scaling_factor": "moe.routed_scale",
    "swiglu_limit": "moe.swiglu_limit",
    "hc_mult": "residual.streams",
    "hc_sinkhorn_iters": "residual.sinkhorn_iterations",
    "hc_eps": "residual.eps",
}
OPTIONAL_KEYS = {"initializer_range", "num_nextn_predict_layers", "bos_token_id", "eos_token_id"}
# Strict readers want a fraction in the JSON even where the value is whole.
FLOAT_KEYS = {"swiglu_limit", "routed_scaling_factor", "hc_eps", "rms_norm_eps", "initializer_range"}
# Keys with one value this architecture allows. Written on export, checked when present.
FIXED_KEYS: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "num_key_value_heads": 1,
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
WRITTEN_KEYS = {"use_cache": True}
IGNORED_KEYS = {"architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path"}
YARN_KEYS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_context",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
}
STRUCTURED_KEYS = {
    "num_hidden_layers", "compress_ratios", "rope_scaling", "layer_types", "compress_rates", "expert_dtype",
    "quantization_config",
}  # fmt: skip
FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
LAYER_TYPES = {
    "window": "sliding_attention",
    "csa": "compressed_sparse_attention",
    "hca": "heavily_compressed_attention",
}


def read_released(path: str | Path) -> ModelConfig:
    """Reads a `config.json` (or the one in a directory).

    Raises ConfigError listing every missing, contradictory or unsupported key; warns once, naming unknown keys.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: a released checkpoint has a config.json") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds {type(raw).__name__}, expected an object")
    try:
        return from_released(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def from_released(raw: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a released config given as a dict; errors and warnings as `read_released`."""
    if raw.get("model_type") != "deepseek_v4":
        raise ConfigError(
            f"model_type is {raw.get('model_type')!r}: this is another architecture; only 'deepseek_v4' is read"
        )
    problems = [f"{key} is missing" for key in PLAIN_KEYS if key not in raw and key not in OPTIONAL_KEYS]
    problems += [f"{key} is missing" for key in ("num_hidden_layers", "compress_ratios") if key not in raw]
    problems += [
        f"{key} is {raw[key]!r}, only {value!r} is supported"
        for key, value in FIXED_KEYS.items()
        if key in raw and raw[key] != value
    ]
    if problems:
        raise ConfigError("; ".join(problems))
    known = PLAIN_KEYS.keys() | FIXED_KEYS.keys() | WRITTEN_KEYS.keys() | IGNORED_KEYS | STRUCTURED_KEYS
    unknown = sorted(raw.keys() - known)
    if any("dspark" in key for key in unknown):
        raise ConfigError(_DSPARK)
    if unknown:
        warnings.warn(f"config.json keys not known to dsv4, ignored: {', '.join(unknown)}", stacklevel=3)
    groups: dict[str, dict[str, Any]] = {"": {}, "attention": {}, "indexer": {}, "moe": {}, "residual": {}}
    for key, dotted in PLAIN_KEYS.items():
        if key in raw:
            group, _, name = dotted.rpartition(".")
            groups[group][name] = _checked(key, raw[key])
    return ModelConfig(
        layers=_layers(raw),
        attention=AttentionConfig(**groups["attention"], yarn=_yarn(raw.get("rope_scaling"))),
        indexer=IndexerConfig(**groups["indexer"]),
        moe=MoEConfig(**groups["moe"]),
        residual=HyperConnectionConfig(**groups["residual"]),
        storage=_storage(raw),
        **groups[""],
    )


_DSPARK = (
    "this checkpoint has dspark stages instead of MTP blocks (a later release of V4-Flash, 46 compress_ratios), "
    "which dsv4 does not support yet; use the first release"
)


def _checked(key: str, value: Any) -> Any:
    if key in ("scoring_func", "norm_topk_prob"):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key} is {value!r}, expected a number")
    floats = ("eps", "theta", "factor", "limit", "range")
    if not any(word in key for word in floats) and not isinstance(value, int):
        raise ConfigError(f"{key} is {value!r}, expected an integer")
    return value


def _layers(raw: dict[str, Any]) -> tuple:
    count, ratios = raw["num_hidden_layers"], raw["compress_ratios"]
    if not isinstance(ratios, list) or not all(isinstance(r, int) and r >= 0 for r in ratios):
        raise ConfigError(f"compress_ratios is {ratios!r}, expected a list of integers >= 0")
    extra = len(ratios) - count
    if extra == 3 and raw.get("num_nextn_predict_layers", 0) != 3:
        raise ConfigError(_DSPARK)
    if extra < 0 or any(ratios[count:]):
        raise ConfigError(
            f"compress_ratios has {len(ratios)} entries for num_hidden_layers {count}: one a layer, then zeros for MTP"
        )
    layers = tuple(released_layer(ratio) for ratio in ratios[:count])
    types = raw.get("layer_types")
    if types is not None and list(types) != [LAYER_TYPES[layer.kind] for layer in layers]:
        raise ConfigError(f"layer_types {types!r} contradicts compress_ratios {ratios!r}")
    for name, rate in (raw.get("compress_rates") or {}).items():
        kinds = {layer.ratio for layer in layers if LAYER_TYPES[layer.kind] == name}
        if kinds - {rate}:
            raise ConfigError(f"compress_rates {name} is {rate} but compress_ratios has {sorted(kinds)}")
    return layers


def _yarn(scaling: Any) -> YarnConfig | None:
    if scaling is None:
        return None
    kind = scaling.get("type", scaling.get("rope_type")) if isinstance(scaling, dict) else None
    if kind != "yarn":
        raise ConfigError(f"rope_scaling is {scaling!r}: only type 'yarn' (or none) is supported")
    missing = [key for key in YARN_KEYS if key not in scaling]
    if missing:
        raise ConfigError(f"rope_scaling lacks {', '.join(missing)}")
    unknown = sorted(scaling.keys() - YARN_KEYS.keys() - {"type", "rope_type"})
    if unknown:
        warnings.warn(f"rope_scaling keys not known to dsv4, ignored: {', '.join(unknown)}", stacklevel=4)
    return YarnConfig(**{field: scaling[key] for key, field in YARN_KEYS.items()})


def _storage(raw: dict[str, Any]) -> StorageConfig:
    dtype = raw.get("torch_dtype", raw.get("dtype", "bfloat16"))
    if dtype not in ("bfloat16", "float32"):
        raise ConfigError(f"torch_dtype is {dtype!r}: bfloat16 or float32")
    quantization, experts = raw.get("quantization_config"), raw.get("expert_dtype")
    if quantization is None:
        if experts is not None:
            raise ConfigError(f"expert_dtype is {experts!r} but there is no quantization_config")
        return StorageConfig(dtype)
    wrong = {key: quantization.get(key) for key, value in FP8.items() if quantization.get(key) != value}
    if wrong:
        raise ConfigError(f"quantization_config has {wrong!r}, only {FP8!r} is supported")
    if experts not in (None, "fp4", "fp8"):
        raise ConfigError(f"expert_dtype is {experts!r}: fp4, fp8 or absent (fp8)")
    return StorageConfig(dtype, "fp8", experts or "fp8")


def to_released(config: ModelConfig) -> dict[str, Any]:
    """The released config.json of `config`. Raises ConfigError for a model the released format cannot express."""
    problems = [f"layer {i} is {layer}" for i, layer in enumerate(config.layers) if not _expressible(layer)]
    problems += ["attention.sink is off"] if not config.attention.sink else []
    problems += [f"residual.kind is {config.residual.kind}"] if config.residual.kind != "hyper" else []
    problems += ["moe.experts is 0"] if not config.moe.experts else []
    problems += ["moe.shared is 0"] if not config.moe.shared else []
    problems += ["moe.swiglu_limit is 0 (write no clamp as 1e30)"] if not config.moe.swiglu_limit else []
    if problems:
        raise ConfigError(
            "the released format cannot express this model (a research setting): "
            + "; ".join(problems)
            + ". Keep it as an orbax checkpoint, or change those fields"
        )
    _warn_of_other_readers(config)
    raw: dict[str, Any] = {"architectures": ["DeepseekV4ForCausalLM"], "torch_dtype": config.storage.dtype}
    raw |= FIXED_KEYS | WRITTEN_KEYS
    for key, dotted in PLAIN_KEYS.items():
        value: Any = config
        for name in dotted.split("."):
            value = getattr(value, name)
        raw[key] = float(value) if key in FLOAT_KEYS else value
    raw["num_hidden_layers"] = len(config.layers)
    raw["compress_ratios"] = [layer.ratio for layer in config.layers] + [0] * config.mtp_blocks
    if (yarn := config.attention.yarn) is not None:
        raw["rope_scaling"] = {"type": "yarn"} | {key: getattr(yarn, name) for key, name in YARN_KEYS.items()}
    if config.storage.dense == "fp8":
        raw["quantization_config"] = FP8
        raw["expert_dtype"] = config.storage.experts if config.storage.experts != "plain" else "fp8"
    hca_ratios = {layer.ratio for layer in config.layers if layer.kind == "hca"}
    if len(hca_ratios) == 1 and hca_ratios != {128}:
        # Readers that look at layer_types instead of compress_ratios assume a ratio of 128 unless told.
        raw["layer_types"] = [LAYER_TYPES[layer.kind] for layer in config.layers]
        raw["compress_rates"] = {LAYER_TYPES["csa"]: 4, LAYER_TYPES["hca"]: hca_ratios.pop()}
    return raw


def _expressible(layer: Any) -> bool:
    return layer.kind != "full" and released_layer(layer.ratio) == layer


def _warn_of_other_readers(config: ModelConfig) -> None:
    """Settings that the released format has a key for, but another implementation is known to ignore."""
    ignored = [] if config.moe.normalize and config.moe.scoring != "softmax" else ["weights that are not renormalised"]
    ignored += [f"{config.moe.shared} shared experts (they assume 1)"] if config.moe.shared > 1 else []
    if ignored:
        warnings.warn(f"other implementations of deepseek_v4 ignore: {'; '.join(ignored)}", stacklevel=3)


def write_released(config: ModelConfig, path: str | Path) -> None:
    """Writes `config` as a released config.json to the file `path`, atomically."""
    path = Path(path)
    text = json.dumps(to_released(config), indent=2) + "\n"
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)

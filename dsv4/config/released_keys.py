"""The keys of the released `config.json`: one table for reading and for writing.

A key inside an object is written with a dot (`rope_scaling.factor`), as is a field of ModelConfig.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from dsv4.config.errors import one_of
from dsv4.config.model import SCORINGS

Kind = type[int] | type[float] | type[bool] | tuple[str, ...]


class Key(NamedTuple):
    """Where a released value goes, and what kind of JSON value it is.

    int: a whole number of at least 0, never written with a fraction. float: any finite number. bool: true or false. A
    tuple: one of these strings. A key that is not required may be absent or null.
    """

    field: str
    kind: Kind
    required: bool = True


_DTYPES = ("bfloat16", "float32")

KEYS = {
    "dtype": Key("storage.dtype", _DTYPES, required=False),  # the newer name of torch_dtype
    "torch_dtype": Key("storage.dtype", _DTYPES, required=False),
    "vocab_size": Key("vocab_size", int),
    "hidden_size": Key("width", int),
    "max_position_embeddings": Key("max_context", int),
    "num_nextn_predict_layers": Key("mtp_blocks", int, required=False),
    "rms_norm_eps": Key("norm_eps", float),
    "initializer_range": Key("initializer_range", float, required=False),
    "bos_token_id": Key("bos_id", int, required=False),
    "eos_token_id": Key("eos_id", int, required=False),
    "num_attention_heads": Key("attention.heads", int),
    "head_dim": Key("attention.head_dim", int),
    "qk_rope_head_dim": Key("attention.rope_dim", int),
    "q_lora_rank": Key("attention.q_lora_rank", int),
    "o_groups": Key("attention.o_groups", int),
    "o_lora_rank": Key("attention.o_lora_rank", int),
    "sliding_window": Key("attention.window", int),
    "rope_theta": Key("attention.rope_theta", float),
    "compress_rope_theta": Key("attention.compress_rope_theta", float),
    "rope_scaling.factor": Key("attention.yarn.factor", float),
    "rope_scaling.original_max_position_embeddings": Key("attention.yarn.original_context", int),
    "rope_scaling.beta_fast": Key("attention.yarn.beta_fast", float),
    "rope_scaling.beta_slow": Key("attention.yarn.beta_slow", float),
    "index_n_heads": Key("indexer.heads", int),
    "index_head_dim": Key("indexer.head_dim", int),
    "index_topk": Key("indexer.top_k", int),
    "n_routed_experts": Key("moe.experts", int),
    "num_experts_per_tok": Key("moe.per_token", int),
    "n_shared_experts": Key("moe.shared", int),
    "moe_intermediate_size": Key("moe.expert_width", int),
    "num_hash_layers": Key("moe.hash_layers", int),
    "scoring_func": Key("moe.scoring", SCORINGS),
    "norm_topk_prob": Key("moe.normalize", bool),
    "routed_scaling_factor": Key("moe.routed_scale", float),
    "swiglu_limit": Key("moe.swiglu_limit", float),
    "hc_mult": Key("residual.streams", int),
    "hc_sinkhorn_iters": Key("residual.sinkhorn_iterations", int),
    "hc_eps": Key("residual.eps", float),
    "expert_dtype": Key("storage.experts", ("fp4", "fp8"), required=False),  # absent in a quantised file: fp8
}
# Keys with one value this architecture allows: written on export, checked when present.
FIXED: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "num_key_value_heads": 1,
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "rope_scaling.type": "yarn",
    "rope_scaling.rope_type": "yarn",
    "quantization_config.activation_scheme": "dynamic",
    "quantization_config.fmt": "e4m3",
    "quantization_config.quant_method": "fp8",
    "quantization_config.scale_fmt": "ue8m0",
    "quantization_config.weight_block_size": [128, 128],
}
SECTIONS = ("rope_scaling", "quantization_config")  # optional; all their keys are required, but for the two types
SECOND_NAMES = {"dtype", "rope_scaling.rope_type"}  # read, never written
WRITTEN = {"architectures": ["DeepseekV4ForCausalLM"], "use_cache": True}  # never read
IGNORED = {"transformers_version", "_name_or_path"}
SCHEDULE = {"num_hidden_layers", "compress_ratios", "layer_types", "compress_rates"}
LAYER_TYPES = {
    "window": "sliding_attention",
    "csa": "compressed_sparse_attention",
    "hca": "heavily_compressed_attention",
}


def section(key: str) -> str:
    """The object that holds `key`, "" for the file itself."""
    return key.rpartition(".")[0]


def expected(value: Any, kind: Kind) -> str | None:
    """What `value` should have been, None if it is of this kind. A bool is no number here."""
    if isinstance(kind, tuple):
        return None if isinstance(value, str) and value in kind else f"expected {one_of(kind)}"
    if kind is bool:
        return None if isinstance(value, bool) else "expected true or false"
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind is int:
        return None if whole and value >= 0 else "expected an integer of at least 0"
    number = whole or isinstance(value, float)
    return None if number and abs(value) <= sys.float_info.max else "expected a finite number"


def is_fixed(value: Any, key: str) -> bool:
    """Whether `value` is the one allowed for `key`: neither 1 for true nor 1.0 for 1, but 0 for 0.0."""
    allowed = FIXED[key]
    if isinstance(allowed, float):
        return expected(value, float) is None and value == allowed
    return repr(value) == repr(allowed)

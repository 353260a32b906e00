"""The cases of make_oracle.py. `config` holds what differs from BASE. `gains` scale weight initialisation by tensor-name
suffix."""

from __future__ import annotations

import copy

YARN = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}

BASE = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "torch_dtype": "float32",
    "vocab_size": 256,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 48,
    "o_lora_rank": 24,
    "o_groups": 2,
    "sliding_window": 32,
    "index_n_heads": 8,
    "index_head_dim": 32,
    "index_topk": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_hash_layers": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "hidden_act": "silu",
    "swiglu_limit": 10.0,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-06,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "max_position_embeddings": 1048576,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.02,
    "use_cache": True,
}

CASES = {
    # (a) sliding-window layers only: plain rope (rope_theta), no compressor.
    "swa": {
        "config": {"num_hidden_layers": 4, "compress_ratios": [0, 0, 0, 0], "sliding_window": 16,
                   "q_lora_rank": 32, "n_routed_experts": 4, "swiglu_limit": 1.5, "rope_scaling": YARN},
        "seed": 11,
        "inputs": [{"name": "main", "batch": 2, "length": 75, "decode": 12, "chunks": [20, 37, 18], "seed": 1}],
    },
    # (b) CSA only; 63 compressed entries against index_topk 8; no rope_scaling (plain compress_rope_theta).
    "csa": {
        "config": {"num_hidden_layers": 4, "compress_ratios": [4, 4, 4, 4], "sliding_window": 16,
                   "index_head_dim": 64, "q_lora_rank": 32, "n_routed_experts": 4},
        "seed": 12,
        "inputs": [{"name": "main", "batch": 1, "length": 253, "decode": 14, "chunks": [101, 3, 1, 148], "seed": 2}],
    },
    # (c1) HCA with a small rate (16). Original-style readers take it from compress_ratios; transformers reads
    # layer_types + compress_rates instead, so those two extra keys are present here. Unusual constants on purpose
    # (eps, Sinkhorn iterations, thetas, routed scale), so that hard-coded ones show.
    "hca16": {
        "config": {"num_hidden_layers": 4, "compress_ratios": [16, 16, 16, 16], "sliding_window": 24,
                   "q_lora_rank": 32, "n_routed_experts": 4, "rope_scaling": YARN,
                   "rms_norm_eps": 1e-3, "hc_eps": 1e-2, "hc_sinkhorn_iters": 5, "routed_scaling_factor": 2.25,
                   "rope_theta": 500, "compress_rope_theta": 7000},
        "seed": 13,
        "inputs": [{"name": "main", "batch": 1, "length": 141, "decode": 22, "chunks": [50, 1, 90], "seed": 3}],
    },
    # (c2) HCA with the true rate of 128; decoding crosses position 383 -> the third entry appears.
    "hca128": {
        "config": {"num_hidden_layers": 4, "compress_ratios": [128, 128, 128, 128], "sliding_window": 24,
                   "q_lora_rank": 32, "n_routed_experts": 4, "num_hash_layers": 0, "rope_scaling": YARN},
        "seed": 14,
        "inputs": [{"name": "main", "batch": 1, "length": 379, "decode": 10, "chunks": [200, 100, 79], "seed": 4}],
    },
    # (d) mixed schedule like V4-Flash incl. an MTP block in the checkpoint, sharded + index.json;
    # (e) the odd lengths run on the same checkpoint.
    "mixed": {
        "config": {"num_hidden_layers": 7, "compress_ratios": [0, 0, 4, 128, 4, 128, 4, 0], "num_hash_layers": 3,
                   "head_dim": 64, "num_nextn_predict_layers": 1, "swiglu_limit": 1.0, "rope_scaling": YARN},
        "seed": 15,
        "shards": 2,
        "inputs": [
            {"name": "main", "batch": 1, "length": 251, "decode": 12, "chunks": [130, 1, 2, 118], "seed": 5,
             "trace": [0, 1, 2, 3, 4, 7, 8, 31, 32, 33, 63, 64, 126, 127, 128, 129, 200, 250]},
            {"name": "mtp", "batch": 1, "length": 37, "decode": 0, "seed": 6, "mtp": True},
        ] + [
            {"name": f"len{n}", "batch": 1 if n in (127, 128) else 2, "length": n, "decode": 12 if n == 1 else 6,
             "seed": 100 + n}
            for n in (1, 2, 3, 4, 5, 7, 8, 31, 32, 33, 127, 128, 129)
        ],
    },
    # (d') the quantised hub layout: FP8 128x128 blocks + ue8m0 scales, packed FP4 experts + 1x32 ue8m0 scales,
    # BF16 for the rest. Reference = transformers' own dequantisation to float32, float32 activations.
    "mixed_fp8fp4": {
        "config": {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128], "hidden_size": 128, "head_dim": 64,
                   "num_attention_heads": 8, "hc_mult": 2, "q_lora_rank": 64, "o_lora_rank": 32,
                   "moe_intermediate_size": 32, "rope_scaling": YARN,
                   "torch_dtype": "bfloat16", "expert_dtype": "fp4",
                   "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                                           "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}},
        "seed": 17,
        "inputs": [{"name": "main", "batch": 1, "length": 150, "decode": 6, "chunks": [64, 86], "seed": 7}],
    },
}

# Decision margins asked of the token search (see README): relative to the row's score spread for the indexer,
# absolute for the router (scores are O(1)) and for the arg-max of the logits.
MARGINS = {"index": 0.02, "router": 0.02, "logit": 0.02}


def full_config(case: dict) -> dict:
    cfg = copy.deepcopy({**BASE, **case["config"]})
    rates = sorted({r for r in cfg["compress_ratios"] if r not in (0, 4)})
    if rates not in ([], [128]):  # transformers only maps 0/4/128; give it its own keys too
        assert len(rates) == 1
        n = cfg["num_hidden_layers"]
        kind = {0: "sliding_attention", 4: "compressed_sparse_attention"}
        cfg["layer_types"] = [kind.get(r, "heavily_compressed_attention") for r in cfg["compress_ratios"][:n]]
        cfg["compress_rates"] = {"compressed_sparse_attention": 4, "heavily_compressed_attention": rates[0]}
    return cfg

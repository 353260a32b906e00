"""What a config refuses: every message names the field and its value."""

import dataclasses
import math

import pytest

from dsv4.config import (
    AttentionConfig,
    ConfigError,
    Execution,
    HyperConnectionConfig,
    IndexerConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    StorageConfig,
    TrainConfig,
    YarnConfig,
)
from dsv4.config.cache import CacheFormat
from pallas_kernels.formats import FP8_BLOCK

CSA = (LayerConfig("csa", 4),)
TOO_SMALL = {
    AttentionConfig: ("heads", "head_dim", "rope_dim", "q_lora_rank", "o_groups", "o_lora_rank", "window"),
    IndexerConfig: ("heads", "head_dim", "top_k"),
    TrainConfig: ("steps", "batch", "length", "eval_every", "save_every"),
    Execution: ("prefill_chunk",),
}
REFUSED = [
    *((kind, {name: 0}, f"{name} is 0: it must be at least 1") for kind, names in TOO_SMALL.items() for name in names),
    (LayerConfig, {"kind": "local"}, "layer kind 'local': window, csa, hca or full"),
    (LayerConfig, {"kind": "csa"}, "layer csa with ratio 0"),
    (LayerConfig, {"kind": "hca", "ratio": 1}, "layer hca with ratio 1"),
    (LayerConfig, {"kind": "window", "ratio": 4}, "layer window with ratio 4"),
    (LayerConfig, {"kind": "full", "ratio": -1}, "layer full with ratio -1"),
    (YarnConfig, {"factor": 0.0}, "attention.yarn.factor is 0.0"),
    (YarnConfig, {"factor": math.nan}, "attention.yarn.factor is nan"),
    (YarnConfig, {"original_context": 0}, "attention.yarn.original_context is 0"),
    (YarnConfig, {"beta_fast": 1.0, "beta_slow": 2.0}, "beta_fast 1.0 must be at least attention.yarn.beta_slow 2.0"),
    (YarnConfig, {"beta_slow": 0.0}, "both positive"),
    (AttentionConfig, {"rope_dim": 7}, "rope_dim is 7: rotary dims come in pairs"),
    (AttentionConfig, {"rope_dim": 64, "head_dim": 32}, "rope_dim 64 exceeds attention.head_dim 32"),
    (AttentionConfig, {"heads": 6, "o_groups": 4}, "heads 6 is not a multiple of attention.o_groups 4"),
    (AttentionConfig, {"rope_theta": 0.0}, "attention.rope_theta is 0.0"),
    (AttentionConfig, {"compress_rope_theta": -1.0}, "attention.compress_rope_theta is -1.0"),
    (MoEConfig, {"scoring": "relu"}, "moe.scoring is 'relu': sqrtsoftplus, softmax or sigmoid"),
    (MoEConfig, {"experts": -1}, "moe.experts is -1"),
    (MoEConfig, {"shared": -1}, "moe.shared is -1"),
    (MoEConfig, {"experts": 0, "shared": 0}, "both 0"),
    (MoEConfig, {"expert_width": 0}, "moe.expert_width is 0"),
    (MoEConfig, {"hash_layers": -1}, "moe.hash_layers is -1"),
    (MoEConfig, {"experts": 0, "hash_layers": 1}, "moe.hash_layers is 1 but moe.experts is 0"),
    (MoEConfig, {"routed_scale": 0.0}, "moe.routed_scale is 0.0: it must be positive"),
    (MoEConfig, {"swiglu_limit": -1.0}, "moe.swiglu_limit is -1.0"),
    (MoEConfig, {"per_token": 0}, "moe.per_token is 0: it must be between 1 and moe.experts 256"),
    (MoEConfig, {"per_token": 5, "experts": 4}, "moe.per_token is 5: it must be between 1 and moe.experts 4"),
    (HyperConnectionConfig, {"kind": "none"}, "residual.kind is 'none': hyper or plain"),
    (HyperConnectionConfig, {"streams": 0}, "residual.streams is 0"),
    (HyperConnectionConfig, {"kind": "plain"}, "residual.streams is 4: plain means 1"),
    (HyperConnectionConfig, {"sinkhorn_iterations": 0}, "residual.sinkhorn_iterations is 0"),
    (HyperConnectionConfig, {"eps": -1e-6}, "residual.eps is -1e-06"),
    (StorageConfig, {"dtype": "float16"}, "storage.dtype is 'float16': bfloat16 or float32"),
    (StorageConfig, {"dense": "fp5"}, "storage.dense is 'fp5': plain, fp8, fp4,"),
    (StorageConfig, {"experts": "int8:0x3:float32"}, "storage.experts is 'int8:0x3:float32': plain, fp8, fp4,"),
    (StorageConfig, {"activations": "fp8_tensor"}, "storage.activations is 'fp8_tensor': a tile must lie in one row"),
    (StorageConfig, {"rotate": True}, "storage.rotate, outlier_channels and static_activations need quantised"),
    (StorageConfig, {"outlier_channels": -1}, "storage.outlier_channels is -1: at least 0"),
    (StorageConfig, {"dense": "fp8", "static_activations": True}, "a static scale is a float32"),
    (ModelConfig, {"layers": ()}, "layers is empty"),
    (ModelConfig, {"vocab_size": 0}, "vocab_size is 0"),
    (ModelConfig, {"width": -4}, "width is -4"),
    (ModelConfig, {"max_context": 0}, "max_context is 0"),
    (ModelConfig, {"mtp_blocks": 2}, "mtp_blocks is 2: 0 or 1"),
    (ModelConfig, {"moe": MoEConfig(hash_layers=2)}, "moe.hash_layers is 2 but there are 1 layers"),
    (ModelConfig, {"norm_eps": 0.0}, "norm_eps is 0.0"),
    (ModelConfig, {"initializer_range": -0.1}, "initializer_range is -0.1"),
    (ModelConfig, {"indexer": IndexerConfig(head_dim=32)}, "indexer.head_dim 32 is below attention.rope_dim 64"),
    (Execution, {"dtype": "float16"}, "execution.dtype is 'float16': float32 or bfloat16"),
    (CacheFormat, {"index": "int8"}, "cache.index is 'int8': one of float32, bfloat16, fp8, fp4"),
    (Execution, {"activations": FP8_BLOCK}, "execution.activations is e4m3:128x128:ue8m0: a tile must lie in one row"),
    (Execution, {"precision": "high"}, "execution.precision is 'high': default or highest"),
    (TrainConfig, {"optimizer": "adam"}, "train.optimizer is 'adam': muon or adamw"),
    (TrainConfig, {"final_fraction": 1.5}, "train.final_fraction is 1.5: it must be between 0 and 1"),
    *(
        (TrainConfig, {name: 0.0}, f"train.{name} is 0.0: it must be positive")
        for name in ("learning_rate", "matrix_learning_rate", "clip_norm")
    ),
    *(
        (TrainConfig, {name: -1}, f"train.{name} is -1: it cannot be negative")
        for name in (
            "dense_steps", "warmup_steps", "weight_decay", "mtp_weight", "balance_weight", "bias_rate",
            "indexer_weight",
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "fields", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", None))
def test_a_bad_value_is_refused_by_name(kind, fields, message):
    with pytest.raises(ConfigError) as caught:
        kind(**({"layers": CSA} if kind is ModelConfig else {}) | fields)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(layers=(LayerConfig("window"),), indexer=IndexerConfig(head_dim=32)),  # no CSA layer, no indexer
        MoEConfig(experts=0),
        MoEConfig(shared=0),
        MoEConfig(swiglu_limit=0.0),
        HyperConnectionConfig(kind="plain", streams=1),
        HyperConnectionConfig(streams=1),
        StorageConfig(dense="fp8"),
        TrainConfig(final_fraction=0.0, warmup_steps=0, weight_decay=0.0),
    ],
)
def test_neutral_settings_are_allowed(config):
    assert dataclasses.replace(config) == config and hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize("config", [ModelConfig(layers=CSA), Execution(), TrainConfig()])
def test_a_config_is_frozen(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(config)[0].name, 1)


def test_the_first_layers_are_hashed():
    config = ModelConfig(layers=CSA * 3, moe=MoEConfig(hash_layers=2))
    assert [config.hashed(layer) for layer in range(3)] == [True, True, False]

"""DeepSeek-V4-Pro as released: 1.6 T parameters, 49 B active.

dsv4 info pro
"""

from dsv4.config import (
    AttentionConfig,
    IndexerConfig,
    ModelConfig,
    MoEConfig,
    StorageConfig,
    YarnConfig,
)
from dsv4.config.layers import parse_layers

MODEL = ModelConfig(
    layers=parse_layers("hca:128*2," + "csa:4,hca:128," * 29 + "csa:4"),
    vocab_size=129280,
    width=7168,
    max_context=1048576,
    attention=AttentionConfig(
        heads=128, head_dim=512, rope_dim=64, q_lora_rank=1536, o_groups=16, o_lora_rank=1024, window=128,
        yarn=YarnConfig(factor=16.0, original_context=65536),
    ),
    indexer=IndexerConfig(heads=64, head_dim=128, top_k=1024),
    moe=MoEConfig(experts=384, per_token=6, shared=1, expert_width=3072, hash_layers=3, routed_scale=2.5),
    mtp_blocks=1,
    storage=StorageConfig(dense="fp8", experts="fp4"),
)  # fmt: skip

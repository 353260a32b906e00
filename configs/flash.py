"""DeepSeek-V4-Flash as released: 284 B parameters, 13 B active.

dsv4 info flash
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
    layers=parse_layers("window*2," + "csa:4,hca:128," * 20 + "csa:4"),
    vocab_size=129280,
    width=4096,
    max_context=1048576,
    attention=AttentionConfig(
        heads=64, head_dim=512, rope_dim=64, q_lora_rank=1024, o_groups=8, o_lora_rank=1024, window=128,
        yarn=YarnConfig(factor=16.0, original_context=65536),
    ),
    indexer=IndexerConfig(heads=64, head_dim=128, top_k=512),
    moe=MoEConfig(experts=256, per_token=6, shared=1, expert_width=2048, hash_layers=3, routed_scale=1.5),
    mtp_blocks=1,
    storage=StorageConfig(dense="fp8", experts="fp4"),
)  # fmt: skip

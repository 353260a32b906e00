"""Every feature at the smallest size: what the tests run.

dsv4 info tiny
dsv4 train tiny --out runs/tiny
"""

from dsv4.config import (
    AttentionConfig,
    IndexerConfig,
    ModelConfig,
    MoEConfig,
    TrainConfig,
    YarnConfig,
)
from dsv4.config.layers import parse_layers

MODEL = ModelConfig(
    layers=parse_layers("window,csa:4,hca:8,csa:4"),
    vocab_size=320,
    width=32,
    max_context=512,
    attention=AttentionConfig(
        heads=4,
        head_dim=16,
        rope_dim=8,
        q_lora_rank=24,
        o_groups=2,
        o_lora_rank=12,
        window=8,
        yarn=YarnConfig(factor=4.0, original_context=64),
    ),
    indexer=IndexerConfig(heads=8, head_dim=16, top_k=4),
    moe=MoEConfig(experts=4, per_token=2, expert_width=16, hash_layers=1),
    mtp_blocks=1,
)
TRAIN = TrainConfig(steps=20, batch=2, length=64, warmup_steps=2, eval_every=10, save_every=10)

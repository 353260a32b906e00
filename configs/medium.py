"""The larger model whose number formats are measured beside the shipped one's: six times its parameters.

dsv4 train medium --out runs/medium
"""

from dsv4.config import (
    AttentionConfig,
    HyperConnectionConfig,
    IndexerConfig,
    ModelConfig,
    MoEConfig,
    TrainConfig,
    YarnConfig,
)
from dsv4.config.layers import parse_layers

MODEL = ModelConfig(
    layers=parse_layers("window,hca:128,csa:4,hca:128,csa:4,hca:128,csa:4"),
    vocab_size=2048,
    width=512,
    max_context=2048,
    attention=AttentionConfig(
        heads=8,
        head_dim=128,
        rope_dim=32,
        q_lora_rank=256,
        o_groups=2,
        o_lora_rank=128,
        window=128,
        yarn=YarnConfig(factor=4.0, original_context=512),
    ),
    indexer=IndexerConfig(heads=8, head_dim=64, top_k=32),
    moe=MoEConfig(experts=12, per_token=2, expert_width=128, hash_layers=1),
    residual=HyperConnectionConfig(streams=4),
    mtp_blocks=1,
)
TRAIN = TrainConfig(
    steps=450, batch=16, length=2048, dense_steps=0, optimizer="muon", warmup_steps=50, weight_decay=1.0,
    eval_every=450, save_every=450,
)  # fmt: skip

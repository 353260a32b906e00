"""The shipped model: every feature of the architecture in at most 12 MB.

dsv4 train small --out runs/small
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
    layers=parse_layers("window,hca:128,csa:4,hca:128,csa:4"),
    vocab_size=2048,
    width=256,
    max_context=2048,
    attention=AttentionConfig(
        heads=8,
        head_dim=64,
        rope_dim=16,
        q_lora_rank=128,
        o_groups=2,
        o_lora_rank=64,
        window=128,
        yarn=YarnConfig(factor=4.0, original_context=512),
    ),
    indexer=IndexerConfig(heads=4, head_dim=32, top_k=32),
    moe=MoEConfig(experts=8, per_token=2, expert_width=64, hash_layers=1),
    residual=HyperConnectionConfig(streams=4),
    mtp_blocks=1,
)
# 8.5 passes over the corpus: the weight decay, ten times the usual, is what keeps so many from overfitting.
TRAIN = TrainConfig(
    steps=1000, batch=16, length=2048, dense_steps=300, optimizer="muon", warmup_steps=100, weight_decay=1.0,
    eval_every=250, save_every=500,
)  # fmt: skip

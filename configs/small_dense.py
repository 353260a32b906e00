"""The dense control of `small`: full attention, dense SwiGLU, plain residuals, as many ACTIVE parameters.

dsv4 train small_dense --out runs/small_dense
"""

from dsv4.config import AttentionConfig, HyperConnectionConfig, ModelConfig, MoEConfig, TrainConfig
from dsv4.config.layers import parse_layers

MODEL = ModelConfig(
    layers=parse_layers("full*5"),
    vocab_size=2048,
    width=256,
    max_context=2048,
    attention=AttentionConfig(
        heads=8, head_dim=64, rope_dim=16, q_lora_rank=128, o_groups=2, o_lora_rank=64, sink=False
    ),
    moe=MoEConfig(experts=0, shared=1, expert_width=344),
    residual=HyperConnectionConfig(kind="plain", streams=1),
)
TRAIN = TrainConfig(
    steps=1000, batch=16, length=2048, optimizer="muon", warmup_steps=100, weight_decay=1.0, mtp_weight=0.0,
    eval_every=250, save_every=500,
)  # fmt: skip

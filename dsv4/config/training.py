"""How a model is trained: schedule, batch, losses and optimiser as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsv4.config.errors import require


@dataclass(frozen=True)
class TrainConfig:
    """Defaults follow DeepSeek-V4 (arXiv 2606.19348); learning rates are for models of a few million parameters.

    Steps count optimiser updates of `batch` sequences of `length` tokens. During the first `dense_steps` every visible
    compressed entry is attended while the indexer learns from it; after that the top-k selection is in force.
    """

    steps: int = 1000
    batch: int = 16
    length: int = 2048
    dense_steps: int = 0
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 3e-3
    matrix_learning_rate: float = 6e-3  # Muon's matrices: an update has an RMS of 0.18 times this
    final_fraction: float = 0.1  # of the learning rates, at the end of the cosine
    warmup_steps: int = 50
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    mtp_weight: float = 0.3
    balance_weight: float = 1e-4  # sequence-wise balance loss
    bias_rate: float = 1e-3  # router bias step toward balance
    indexer_weight: float = 1.0  # KL of index scores to the layer's own attention
    seed: int = 0
    eval_every: int = 250
    save_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "length", "eval_every", "save_every"):
            require(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}: it must be at least 1")
        require(self.optimizer in ("muon", "adamw"), f"train.optimizer is {self.optimizer!r}: muon or adamw")
        for name in ("learning_rate", "matrix_learning_rate", "clip_norm"):
            require(getattr(self, name) > 0, f"train.{name} is {getattr(self, name)}: it must be positive")
        for name in (
            "dense_steps",
            "warmup_steps",
            "weight_decay",
            "mtp_weight",
            "balance_weight",
            "bias_rate",
            "indexer_weight",
        ):
            require(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}: it cannot be negative")
        require(
            0 <= self.final_fraction <= 1,
            f"train.final_fraction is {self.final_fraction}: it must be between 0 and 1",
        )

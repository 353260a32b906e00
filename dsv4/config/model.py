"""What the model is: every architectural choice of DeepSeek-V4 as a field with a neutral setting.

A variant is `dataclasses.replace`; a sweep is a list of dotted overrides. Field names are this project's; the released
`config.json` names are in `dsv4.config.released`. Letters in comments (D, H, K, R, E, k, n, m) are the axis glossary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from dsv4.config.errors import one_of, require
from dsv4.config.storage import StorageConfig

LayerKind = Literal["window", "csa", "hca", "full"]
Scoring = Literal["sqrtsoftplus", "softmax", "sigmoid"]
Residual = Literal["hyper", "plain"]
SCORINGS: tuple[str, ...] = get_args(Scoring)


@dataclass(frozen=True)
class LayerConfig:
    """One attention layer: which entries its queries see besides themselves.

    `window`: the last `window` tokens. `csa`: window plus the top-k of overlapping compressed entries (ratio m).
    `hca`: window plus every visible non-overlapping compressed entry (ratio m). `full`: all earlier tokens, the
    control architecture; neither compressor nor window.
    """

    kind: LayerKind = "window"
    ratio: int = 0

    def __post_init__(self) -> None:
        require(self.kind in ("window", "csa", "hca", "full"), f"layer kind {self.kind!r}: window, csa, hca or full")
        compressed = self.kind in ("csa", "hca")
        require(
            self.ratio >= 2 if compressed else self.ratio == 0,
            f"layer {self.kind} with ratio {self.ratio}: csa and hca need a ratio of at least 2, the others none",
        )

    @property
    def compressed(self) -> bool:
        return self.kind in ("csa", "hca")

    def __str__(self) -> str:
        return f"{self.kind}:{self.ratio}" if self.compressed else self.kind


@dataclass(frozen=True)
class YarnConfig:
    """YaRN scaling of the rotary frequencies of compressed layers (no attention factor)."""

    factor: float = 16.0
    original_context: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        require(self.factor > 0, f"attention.yarn.factor is {self.factor}: it must be positive")
        require(
            self.original_context > 0,
            f"attention.yarn.original_context is {self.original_context}: it must be positive",
        )
        require(
            self.beta_fast >= self.beta_slow > 0,
            f"attention.yarn.beta_fast {self.beta_fast} must be at least "
            f"attention.yarn.beta_slow {self.beta_slow}, both positive",
        )


@dataclass(frozen=True)
class AttentionConfig:
    heads: int = 64  # H
    head_dim: int = 512  # K: one head is key and value at once
    rope_dim: int = 64  # R: the LAST R of K
    q_lora_rank: int = 1024
    o_groups: int = 8
    o_lora_rank: int = 1024
    window: int = 128
    sink: bool = True  # learned per-head logit in the softmax denominator; False is the neutral setting
    rope_theta: float = 10000.0  # window and full layers, never YaRN
    compress_rope_theta: float = 160000.0  # layers with a compressor
    yarn: YarnConfig | None = None  # layers with a compressor only

    def __post_init__(self) -> None:
        for name in ("heads", "head_dim", "rope_dim", "q_lora_rank", "o_groups", "o_lora_rank", "window"):
            require(getattr(self, name) >= 1, f"attention.{name} is {getattr(self, name)}: it must be at least 1")
        require(self.rope_dim % 2 == 0, f"attention.rope_dim is {self.rope_dim}: rotary dims come in pairs")
        require(
            self.rope_dim <= self.head_dim,
            f"attention.rope_dim {self.rope_dim} exceeds attention.head_dim {self.head_dim}",
        )
        require(
            self.heads % self.o_groups == 0,
            f"attention.heads {self.heads} is not a multiple of attention.o_groups {self.o_groups}",
        )
        for name in ("rope_theta", "compress_rope_theta"):
            require(getattr(self, name) > 0, f"attention.{name} is {getattr(self, name)}: it must be positive")


@dataclass(frozen=True)
class IndexerConfig:
    """Scores compressed entries for the CSA layers; unused where no layer is CSA."""

    heads: int = 64
    head_dim: int = 128
    top_k: int = 512

    def __post_init__(self) -> None:
        for name in ("heads", "head_dim", "top_k"):
            require(getattr(self, name) >= 1, f"indexer.{name} is {getattr(self, name)}: it must be at least 1")


@dataclass(frozen=True)
class MoEConfig:
    """Routed experts plus shared ones. `experts=0` is the dense control: the shared expert alone."""

    experts: int = 256  # E
    per_token: int = 6  # k
    shared: int = 1  # shared experts, stored as one of width shared * expert_width
    expert_width: int = 2048
    hash_layers: int = 0  # the first layers take experts from a table of token ids
    scoring: Scoring = "sqrtsoftplus"
    normalize: bool = True  # renormalise the chosen scores (never with softmax scoring)
    routed_scale: float = 1.5
    swiglu_limit: float = 10.0  # 0: no clamp

    def __post_init__(self) -> None:
        require(self.scoring in SCORINGS, f"moe.scoring is {self.scoring!r}: {one_of(SCORINGS)}")
        for name in ("experts", "shared", "hash_layers"):
            require(getattr(self, name) >= 0, f"moe.{name} is {getattr(self, name)}: it cannot be negative")
        require(self.experts + self.shared > 0, "moe.experts and moe.shared are both 0: a layer needs one expert")
        require(self.expert_width >= 1, f"moe.expert_width is {self.expert_width}: it must be at least 1")
        require(self.routed_scale > 0, f"moe.routed_scale is {self.routed_scale}: it must be positive")
        require(self.swiglu_limit >= 0, f"moe.swiglu_limit is {self.swiglu_limit}: 0 (none) or positive")
        if self.experts:
            require(
                1 <= self.per_token <= self.experts,
                f"moe.per_token is {self.per_token}: it must be between 1 and moe.experts {self.experts}",
            )
        else:
            require(self.hash_layers == 0, f"moe.hash_layers is {self.hash_layers} but moe.experts is 0")


@dataclass(frozen=True)
class HyperConnectionConfig:
    """Manifold-constrained hyper-connections; `kind="plain"` is the ordinary residual stream."""

    kind: Residual = "hyper"
    streams: int = 4  # n
    sinkhorn_iterations: int = 20
    eps: float = 1e-6

    def __post_init__(self) -> None:
        require(self.kind in ("hyper", "plain"), f"residual.kind is {self.kind!r}: hyper or plain")
        require(self.streams >= 1, f"residual.streams is {self.streams}: it must be at least 1")
        require(self.kind == "hyper" or self.streams == 1, f"residual.streams is {self.streams}: plain means 1")
        require(self.sinkhorn_iterations >= 1, f"residual.sinkhorn_iterations is {self.sinkhorn_iterations}: >= 1")
        require(self.eps >= 0, f"residual.eps is {self.eps}: it cannot be negative")


@dataclass(frozen=True)
class ModelConfig:
    layers: tuple[LayerConfig, ...]
    vocab_size: int = 129280
    width: int = 4096  # D
    max_context: int = 1048576
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    indexer: IndexerConfig = field(default_factory=IndexerConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    residual: HyperConnectionConfig = field(default_factory=HyperConnectionConfig)
    mtp_blocks: int = 0  # multi-token prediction blocks, window-only
    norm_eps: float = 1e-6
    initializer_range: float = 0.02  # carried for the released config; dsv4.model.init scales by fan-in instead
    bos_id: int = 0
    eos_id: int = 1
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        require(len(self.layers) >= 1, "layers is empty: a model needs at least one layer")
        for name in ("vocab_size", "width", "max_context"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be at least 1")
        require(self.mtp_blocks in (0, 1), f"mtp_blocks is {self.mtp_blocks}: 0 or 1 are supported")
        require(
            self.moe.hash_layers <= len(self.layers),
            f"moe.hash_layers is {self.moe.hash_layers} but there are {len(self.layers)} layers",
        )
        require(self.norm_eps > 0, f"norm_eps is {self.norm_eps}: it must be positive")
        require(self.initializer_range >= 0, f"initializer_range is {self.initializer_range}: it cannot be negative")
        if any(layer.kind == "csa" for layer in self.layers):
            require(
                self.indexer.head_dim >= self.attention.rope_dim,
                f"indexer.head_dim {self.indexer.head_dim} is below attention.rope_dim {self.attention.rope_dim}",
            )

    def hashed(self, layer: int) -> bool:
        """Whether layer number `layer` routes by token id instead of by score."""
        return layer < self.moe.hash_layers

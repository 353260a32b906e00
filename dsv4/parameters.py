"""Every parameter of the model: shape, stored name, logical axes, initialiser and tensor class, declared once.

The nested dicts mirror both the Flax modules and the tensor names of the released checkpoints: the leaf at
`["layers"][0]["attn"]["wq_a"]["weight"]` is the tensor `layers.0.attn.wq_a.weight`. Only routed experts differ:
`layers.N.ffn.experts.w1.weight` stacks the E tensors `layers.N.ffn.experts.<e>.w1.weight`.

A linear weight is [out, in] with the contracted axis last, as in the files. This module imports no jax, so that
counting the parameters of a 1.6 T model is instant. Names and shapes: tests/oracle/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from dsv4.config.model import LayerConfig, ModelConfig

TensorClass = Literal[
    "dense",  # linear weights that released checkpoints keep in FP8
    "expert",  # routed experts, stacked [E, out, in]
    "projection",  # linear weights that stay in high precision (compressor, indexer weights)
    "embedding",
    "head",
    "router",
    "norm",
    "hyper",  # mHC matrices `fn`
    "hyper_gain",  # mHC base and scale
    "sink",
    "position",  # ape of the compressors
    "bias",  # router bias: moved by load, never by a gradient
    "hash",  # tid2eid: integers
]
Initializer = Literal["fan_in", "embedding", "ones", "zeros", "hash", "hyper_base", "small"]
# Stored in float32 even where the checkpoint's dtype is bfloat16, as in the released ones.
FLOAT32_CLASSES = frozenset({"hyper", "hyper_gain", "sink", "position", "bias"})


@dataclass(frozen=True)
class Spec:
    """One parameter: `axes` name the logical axis of each dimension (sharding tables map them to mesh axes)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    kind: TensorClass
    init: Initializer

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.axes), (self.shape, self.axes)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def trainable(self) -> bool:
        return self.kind not in ("bias", "hash")


SpecTree = dict[Any, Any]  # nested; leaves are Spec


def model_specs(config: ModelConfig) -> SpecTree:
    """The whole parameter tree of `config`."""
    tree: SpecTree = {
        "embed": {"weight": Spec((config.vocab_size, config.width), ("vocab", "embed"), "embedding", "embedding")},
        "layers": {i: block_specs(config, layer, config.hashed(i)) for i, layer in enumerate(config.layers)},
        "norm": _norm(config.width),
        "head": {"weight": Spec((config.vocab_size, config.width), ("vocab", "embed"), "head", "fan_in")},
        **_hyper_head(config),
    }
    if config.mtp_blocks:
        tree["mtp"] = {i: mtp_specs(config) for i in range(config.mtp_blocks)}
    return tree


def block_specs(config: ModelConfig, layer: LayerConfig, hashed: bool) -> SpecTree:
    """One layer: attention, then mixture of experts, each wrapped by hyper-connections."""
    return {
        "attn_norm": _norm(config.width),
        "ffn_norm": _norm(config.width),
        "attn": attention_specs(config, layer),
        "ffn": moe_specs(config, hashed),
        **_hyper(config, "attn"),
        **_hyper(config, "ffn"),
    }


def attention_specs(config: ModelConfig, layer: LayerConfig) -> SpecTree:
    a, width = config.attention, config.width
    grouped = a.heads * a.head_dim // a.o_groups
    tree: SpecTree = {
        "wq_a": _linear(a.q_lora_rank, width, ("q_lora", "embed")),
        "q_norm": _norm(a.q_lora_rank),
        "wq_b": _linear(a.heads * a.head_dim, a.q_lora_rank, ("heads", "q_lora")),
        "wkv": _linear(a.head_dim, width, ("head_dim", "embed")),
        "kv_norm": _norm(a.head_dim),
        "wo_a": _linear(a.o_groups * a.o_lora_rank, grouped, ("o_lora", "head_group")),
        "wo_b": _linear(width, a.o_groups * a.o_lora_rank, ("embed", "o_lora")),
    }
    if a.sink:
        tree["attn_sink"] = Spec((a.heads,), ("heads",), "sink", "zeros")
    if layer.compressed:
        tree["compressor"] = compressor_specs(layer, a.head_dim, width)
    if layer.kind == "csa":
        tree["indexer"] = indexer_specs(config, layer)
    return tree


def compressor_specs(layer: LayerConfig, head_dim: int, width: int) -> SpecTree:
    """CSA pools overlapping blocks and therefore projects to two halves of `head_dim`."""
    out = 2 * head_dim if layer.kind == "csa" else head_dim
    return {
        "wkv": _linear(out, width, ("head_dim", "embed"), "projection"),
        "wgate": _linear(out, width, ("head_dim", "embed"), "projection"),
        "ape": Spec((layer.ratio, out), (None, "head_dim"), "position", "zeros"),
        "norm": _norm(head_dim),
    }


def indexer_specs(config: ModelConfig, layer: LayerConfig) -> SpecTree:
    x = config.indexer
    return {
        "wq_b": _linear(x.heads * x.head_dim, config.attention.q_lora_rank, ("index_heads", "q_lora")),
        "weights_proj": _linear(x.heads, config.width, ("index_heads", "embed"), "projection"),
        "compressor": compressor_specs(layer, x.head_dim, config.width),
    }


def moe_specs(config: ModelConfig, hashed: bool) -> SpecTree:
    m, width = config.moe, config.width
    tree: SpecTree = {}
    if m.experts:
        gate: SpecTree = {"weight": Spec((m.experts, width), ("experts", "embed"), "router", "fan_in")}
        if hashed:
            gate["tid2eid"] = Spec((config.vocab_size, m.per_token), ("vocab", None), "hash", "hash")
        else:
            gate["bias"] = Spec((m.experts,), ("experts",), "bias", "zeros")
        tree["gate"] = gate
        tree["experts"] = _expert(width, m.expert_width, m.experts)
    if m.shared:
        tree["shared_experts"] = _expert(width, m.shared * m.expert_width, None)
    return tree


def mtp_specs(config: ModelConfig) -> SpecTree:
    """A multi-token prediction block; embedding and lm_head are the model's own."""
    width = config.width
    return {
        **block_specs(config, LayerConfig("window"), hashed=False),
        "e_proj": _linear(width, width, ("embed_out", "embed")),
        "h_proj": _linear(width, width, ("embed_out", "embed")),
        "enorm": _norm(width),
        "hnorm": _norm(width),
        "norm": _norm(width),
        **_hyper_head(config),
    }


def _linear(out: int, into: int, axes: tuple[str | None, str | None], kind: TensorClass = "dense") -> SpecTree:
    return {"weight": Spec((out, into), axes, kind, "fan_in")}


def _norm(width: int) -> SpecTree:
    return {"weight": Spec((width,), (None,), "norm", "ones")}


def _expert(width: int, hidden: int, experts: int | None) -> SpecTree:
    stack, axes = ((experts,), ("experts",)) if experts is not None else ((), ())
    kind: TensorClass = "expert" if experts is not None else "dense"
    return {
        "w1": {"weight": Spec((*stack, hidden, width), (*axes, "expert_width", "embed"), kind, "fan_in")},
        "w3": {"weight": Spec((*stack, hidden, width), (*axes, "expert_width", "embed"), kind, "fan_in")},
        "w2": {"weight": Spec((*stack, width, hidden), (*axes, "embed", "expert_width"), kind, "fan_in")},
    }


def _hyper(config: ModelConfig, part: str) -> SpecTree:
    if config.residual.kind == "plain":
        return {}
    n = config.residual.streams
    mixed = (2 + n) * n
    return {
        f"hc_{part}_fn": Spec((mixed, n * config.width), (None, "streams"), "hyper", "small"),
        f"hc_{part}_base": Spec((mixed,), (None,), "hyper_gain", "hyper_base"),
        f"hc_{part}_scale": Spec((3,), (None,), "hyper_gain", "ones"),
    }


def _hyper_head(config: ModelConfig) -> SpecTree:
    if config.residual.kind == "plain":
        return {}
    n = config.residual.streams
    return {
        "hc_head_fn": Spec((n, n * config.width), (None, "streams"), "hyper", "small"),
        "hc_head_base": Spec((n,), (None,), "hyper_gain", "zeros"),
        "hc_head_scale": Spec((1,), (None,), "hyper_gain", "ones"),
    }


def leaves(tree: SpecTree, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Spec]]:
    """(path, Spec) of every leaf, in declaration order."""
    for key, value in tree.items():
        if isinstance(value, Spec):
            yield (*prefix, key), value
        else:
            yield from leaves(value, (*prefix, key))


def nest(items: Iterable[tuple[tuple[Any, ...], Any]]) -> dict[Any, Any]:
    """The nested dict of (path, value) pairs: the inverse of `leaves`."""
    tree: dict[Any, Any] = {}
    for path, value in items:
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return tree


def tensor_name(path: tuple[Any, ...]) -> str:
    """The released name of the leaf at `path` (for stacked experts: without the expert number)."""
    return ".".join(map(str, path))

"""Random checkpoints in the original hub layout: shapes, draws, quantisation, files."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file


def block_shapes(cfg: dict, prefix: str, ratio: int, hashed: bool) -> dict[str, tuple]:
    D, H, hd = cfg["hidden_size"], cfg["num_attention_heads"], cfg["head_dim"]
    ql, ol, G = cfg["q_lora_rank"], cfg["o_lora_rank"], cfg["o_groups"]
    E, I, hc = cfg["n_routed_experts"], cfg["moe_intermediate_size"], cfg["hc_mult"]
    out = {
        "attn.wq_a.weight": (ql, D), "attn.q_norm.weight": (ql,), "attn.wq_b.weight": (H * hd, ql),
        "attn.wkv.weight": (hd, D), "attn.kv_norm.weight": (hd,),
        "attn.wo_a.weight": (G * ol, H * hd // G), "attn.wo_b.weight": (D, G * ol), "attn.attn_sink": (H,),
        "attn_norm.weight": (D,), "ffn_norm.weight": (D,), "ffn.gate.weight": (E, D),
    }
    if ratio:
        w = 2 * hd if ratio == 4 else hd
        out |= {"attn.compressor.ape": (ratio, w), "attn.compressor.wkv.weight": (w, D),
                "attn.compressor.wgate.weight": (w, D), "attn.compressor.norm.weight": (hd,)}
    if ratio == 4:
        ih, idim = cfg["index_n_heads"], cfg["index_head_dim"]
        c = "attn.indexer.compressor."
        out |= {"attn.indexer.wq_b.weight": (ih * idim, ql), "attn.indexer.weights_proj.weight": (ih, D),
                c + "ape": (4, 2 * idim), c + "wkv.weight": (2 * idim, D), c + "wgate.weight": (2 * idim, D),
                c + "norm.weight": (idim,)}
    if hashed:
        out["ffn.gate.tid2eid"] = (cfg["vocab_size"], cfg["num_experts_per_tok"])
    else:
        out["ffn.gate.bias"] = (E,)
    for who in ["shared_experts"] + [f"experts.{e}" for e in range(E)]:
        out |= {f"ffn.{who}.w1.weight": (I, D), f"ffn.{who}.w2.weight": (D, I), f"ffn.{who}.w3.weight": (I, D)}
    for site in ("attn", "ffn"):
        out |= {f"hc_{site}_fn": ((2 + hc) * hc, hc * D), f"hc_{site}_base": ((2 + hc) * hc,),
                f"hc_{site}_scale": (3,)}
    return {f"{prefix}.{k}": v for k, v in out.items()}


def checkpoint_shapes(cfg: dict) -> dict[str, tuple]:
    D, V, hc, n = cfg["hidden_size"], cfg["vocab_size"], cfg["hc_mult"], cfg["num_hidden_layers"]
    head = {"hc_head_fn": (hc, hc * D), "hc_head_base": (hc,), "hc_head_scale": (1,)}
    out = {"embed.weight": (V, D), "norm.weight": (D,), **head}
    if not cfg["tie_word_embeddings"]:
        out["head.weight"] = (V, D)
    for i in range(n):
        out |= block_shapes(cfg, f"layers.{i}", cfg["compress_ratios"][i], i < cfg["num_hash_layers"])
    for m in range(cfg["num_nextn_predict_layers"]):
        p = f"mtp.{m}"
        out |= block_shapes(cfg, p, cfg["compress_ratios"][n + m], False)
        out |= {f"{p}.{k}": v for k, v in head.items()}
        out |= {f"{p}.e_proj.weight": (D, D), f"{p}.h_proj.weight": (D, D), f"{p}.enorm.weight": (D,),
                f"{p}.hnorm.weight": (D,), f"{p}.norm.weight": (D,)}
    return out


def draw(name: str, shape: tuple, cfg: dict, seed: int, gains: dict) -> torch.Tensor:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    leaf = name.split(".")[-1] if name.split(".")[-1] != "weight" else name.split(".")[-2]
    if leaf == "tid2eid":
        rows = np.stack([rng.permutation(cfg["n_routed_experts"])[: shape[1]] for _ in range(shape[0])])
        return torch.from_numpy(rows.astype(np.int64))
    z = rng.standard_normal(shape)
    if leaf.endswith("norm"):
        x = 1.0 + 0.25 * z
    elif leaf == "attn_sink":
        x = z
    elif leaf == "ape":
        x = 0.7 * z
    elif leaf == "bias":
        x = 0.3 * z
    elif leaf in ("hc_attn_base", "hc_ffn_base", "hc_head_base"):
        x = 0.5 * z
    elif leaf in ("hc_attn_scale", "hc_ffn_scale", "hc_head_scale"):
        x = rng.uniform(0.6, 1.4, shape)
    elif leaf == "embed":
        x = z
    else:
        gain = {"wgate": 1.5, "gate": 2.0, "wo_b": 2.0, "wo_a": 1.5, "w2": 1.5, "head": 1.5}.get(leaf, 1.0)
        x = gain * z / np.sqrt(shape[-1])
    for suffix, g in gains.items():
        if name.endswith(suffix):
            x = x * g
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))


def draw_checkpoint(cfg: dict, seed: int, gains: dict) -> dict[str, torch.Tensor]:
    return {k: draw(k, s, cfg, seed, gains) for k, s in checkpoint_shapes(cfg).items()}


FP8_LEAVES = ("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b", "attn.indexer.wq_b",
              "shared_experts.w1", "shared_experts.w2", "shared_experts.w3", "e_proj", "h_proj")


def quantise_checkpoint(tensors: dict[str, torch.Tensor]):
    """-> (tensors as stored in the quantised hub layout, the float32 values that they stand for)."""
    import quant_ref as Q

    stored, meaning = {}, {}
    for name, t in tensors.items():
        stem = name.removesuffix(".weight")
        compressor = ".compressor." in name
        if ".ffn.experts." in name:
            codes, scale = Q.fp4_quant(t.numpy())
            stored[name] = torch.from_numpy(Q.fp4_pack(codes).view(np.int8))
            stored[stem + ".scale"] = torch.from_numpy(scale).view(torch.float8_e8m0fnu)
            meaning[name] = torch.from_numpy(Q.fp4_dequant(codes, scale))
        elif name.endswith(".weight") and not compressor and stem.endswith(FP8_LEAVES):
            codes, scale = Q.weight_quant(t.numpy())
            stored[name] = torch.from_numpy(codes).view(torch.float8_e4m3fn)
            stored[stem + ".scale"] = torch.from_numpy(scale).view(torch.float8_e8m0fnu)
            meaning[name] = torch.from_numpy(Q.weight_dequant(codes, scale))
        elif name.endswith(".weight"):
            stored[name] = t.to(torch.bfloat16)
            meaning[name] = stored[name].float()
        else:  # hc_*, ape, attn_sink, gate.bias stay float32, tid2eid int64
            stored[name] = meaning[name] = t
    return stored, meaning


def write_checkpoint(path: Path, cfg: dict, tensors: dict, shards: int = 1) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for old in path.glob("model*"):
        old.unlink()
    (path / "config.json").write_text(json.dumps(cfg, indent=2) + "\n")
    names = list(tensors)
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    cut = [names[i::shards] for i in range(shards)]  # interleaved on purpose: a layer spans shards
    weight_map = {}
    for i, part in enumerate(cut):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({k: tensors[k] for k in part}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

"""transformers' side: where its tensors are, its model with probes, its float64 twin, its layers as an MTP block."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch

from oracle_cases import MARGINS


def hf_target(name: str, cfg: dict):
    """Original tensor name -> (transformers state-dict key, index into it). Written independently of
    transformers' own conversion table, to check that table."""
    top = {"embed.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight",
           "norm.weight": "model.norm.weight", "hc_head_fn": "model.hc_head.hc_fn",
           "hc_head_base": "model.hc_head.hc_base", "hc_head_scale": "model.hc_head.hc_scale"}
    if name in top:
        return top[name], None
    _, i, rest = name.split(".", 2)
    p = f"model.layers.{i}."
    comp = {"ape": "position_bias", "wkv.weight": "kv_proj.weight", "wgate.weight": "gate_proj.weight",
            "norm.weight": "kv_norm.weight"}
    if rest.startswith("attn.indexer.compressor."):
        return p + "self_attn.compressor.indexer." + comp[rest.removeprefix("attn.indexer.compressor.")], None
    if rest.startswith("attn.compressor."):
        return p + "self_attn.compressor." + comp[rest.removeprefix("attn.compressor.")], None
    fixed = {
        "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
        "attn.indexer.weights_proj.weight": "self_attn.compressor.indexer.scorer.weights_proj.weight",
        "attn.wq_a.weight": "self_attn.q_a_proj.weight", "attn.q_norm.weight": "self_attn.q_a_norm.weight",
        "attn.wq_b.weight": "self_attn.q_b_proj.weight", "attn.wkv.weight": "self_attn.kv_proj.weight",
        "attn.kv_norm.weight": "self_attn.kv_norm.weight", "attn.wo_a.weight": "self_attn.o_a_proj.weight",
        "attn.wo_b.weight": "self_attn.o_b_proj.weight", "attn.attn_sink": "self_attn.sinks",
        "attn_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight",
        "ffn.gate.weight": "mlp.gate.weight", "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
        "ffn.gate.tid2eid": "mlp.gate.tid2eid",
        "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
        "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
        "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
        **{f"hc_{s}_{k}": f"{s}_hc.{k}" for s in ("attn", "ffn") for k in ("fn", "base", "scale")},
    }
    if rest in fixed:
        return p + fixed[rest], None
    _, _, e, w, _ = rest.split(".")
    I = cfg["moe_intermediate_size"]
    if w == "w2":
        return p + "mlp.experts.down_proj", (int(e),)
    return p + "mlp.experts.gate_up_proj", (int(e), slice(0, I) if w == "w1" else slice(I, 2 * I))


def load_reference(path: Path, cfg: dict, tensors: dict):
    from transformers import DeepseekV4ForCausalLM

    model, info = DeepseekV4ForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
        output_loading_info=True)
    model = model.eval().float()  # the quantised path leaves BF16 tensors as BF16; widening them is exact
    problems = {k: v for k, v in info.items() if v and k != "unexpected_keys"}
    extra = [k for k in info.get("unexpected_keys", []) if not k.startswith("mtp.")]
    assert not problems and not extra, (problems, extra)
    state = model.state_dict()
    assert all(v.dtype in (torch.float32, torch.int64) for v in state.values())
    covered = {k: torch.zeros(v.shape, dtype=torch.bool) for k, v in state.items()}
    for name, t in tensors.items():
        if name.startswith("mtp."):
            continue
        key, idx = hf_target(name, cfg)
        got = state[key] if idx is None else state[key][idx]
        assert got.shape == t.shape and torch.equal(got, t), f"{name} did not arrive at {key}{idx}"
        covered[key][idx if idx is not None else ...] = True
    if cfg["tie_word_embeddings"]:
        assert torch.equal(state["lm_head.weight"], tensors["embed.weight"])
        covered.pop("lm_head.weight")
    left = [k for k, v in covered.items() if not v.all()]
    assert not left, f"not covered by the checkpoint: {left}"
    return model


class Probe:
    """Forward hooks that record the scores behind each discrete decision, and layer outputs."""

    def __init__(self, model):
        self.model, self.on = model, True
        self.clear()
        self.handles = []
        for i, layer in enumerate(model.model.layers):
            self.handles.append(layer.register_forward_hook(self._save("streams", i)))
            self.handles.append(layer.self_attn.register_forward_hook(self._save("attn_out", i, first=True)))
            self.handles.append(layer.mlp.register_forward_hook(self._save("ffn_out", i)))
            self.handles.append(layer.mlp.gate.register_forward_hook(self._save("gate", i)))
            comp = layer.self_attn.compressor
            if comp is not None:
                self.handles.append(comp.register_forward_hook(self._save("compressed", i, first=True)))
                if hasattr(comp, "indexer"):
                    self.handles.append(comp.indexer.register_forward_hook(self._save("topk", i)))
                    self.handles.append(comp.indexer.scorer.register_forward_hook(self._save("index", i, args=True)))

    def clear(self):
        self.got = {}

    def _save(self, kind, i, first=False, args=False):
        def hook(_, inputs, output):
            if self.on:
                self.got[kind, i] = (output, inputs[1]) if args else output[0] if first else output
        return hook

    def margins(self, positions: torch.Tensor, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        """Per (row, position) the smallest gap at each kind of decision. logits: [B, S, V]."""
        B, S = logits.shape[:2]
        cfg = self.model.config
        inf = torch.full((B, S), float("inf"))
        out = {"index": inf.clone(), "index_abs": inf.clone(), "router": inf.clone()}
        rate = cfg.compress_rates["compressed_sparse_attention"]
        for (kind, i), value in self.got.items():
            if kind == "index":
                scores = value[0].double()  # [B, S, T]
                T, k = scores.shape[-1], cfg.index_topk
                if T <= k:
                    continue
                valid = (positions + 1) // rate  # [S]
                masked = scores.masked_fill(torch.arange(T) >= valid[:, None], float("-inf"))
                top = masked.topk(k + 1, dim=-1).values
                gap = top[..., k - 1] - top[..., k]
                n = valid.clamp(min=1)[None]
                keep = torch.isfinite(masked)
                mean = masked.masked_fill(~keep, 0).sum(-1) / n
                std = ((masked.masked_fill(~keep, 0) - mean[..., None] * keep) ** 2).sum(-1).div(n).sqrt()
                decides = (valid > k)[None].expand(B, -1)
                out["index_abs"] = torch.where(decides, torch.minimum(out["index_abs"], gap), out["index_abs"])
                rel = gap / std.clamp(min=1e-12)
                out["index"] = torch.where(decides, torch.minimum(out["index"], rel), out["index"])
            elif kind == "gate":
                gate = self.model.model.layers[i].mlp.gate
                if hasattr(gate, "tid2eid"):
                    continue
                s = (gate.score_fn(value[0]) + gate.e_score_correction_bias).view(B, S, -1).double()
                if s.shape[-1] > gate.top_k:
                    top = s.topk(gate.top_k + 1, dim=-1).values
                    out["router"] = torch.minimum(out["router"], top[..., gate.top_k - 1] - top[..., gate.top_k])
        top = logits.double().topk(2, dim=-1).values
        out["logit"] = top[..., 0] - top[..., 1]
        return out


def new_cache(model):
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def step(model, ids, cache):
    return model(ids, past_key_values=cache, use_cache=True).logits


def quality(m: dict[str, torch.Tensor]) -> torch.Tensor:
    """min over kinds of margin / asked margin, shape [B, S]."""
    return torch.stack([m[k] / MARGINS[k] for k in MARGINS]).amin(0)


def search_tokens(model, probe, length: int, decode: int, seed: int, width: int = 24) -> np.ndarray:
    """One row of `length` tokens with no near-tie in any decision, nor in `decode` greedy steps after it.

    Token by token: of `width` random candidates take the first whose decisions all keep the asked margin (else the
    best). The last token is chosen among the whole vocabulary by the worst margin over itself and the greedy steps."""
    rng = np.random.default_rng([seed, length])
    V = model.config.vocab_size
    cache, tokens = new_cache(model), []
    for pos in range(length - 1):
        cand = torch.from_numpy(rng.permutation(V)[:width].astype(np.int64))
        probe.clear()
        logits = step(model, cand[:, None], cache)
        q = quality(probe.margins(torch.tensor([pos]), logits))[:, 0]
        ok = (q >= 1).nonzero()
        pick = int(ok[0]) if len(ok) else int(q.argmax())
        tokens.append(int(cand[pick]))
        cache.reorder_cache(torch.full((width,), pick))
    cand = torch.arange(V)
    if length > 1:
        cache.reorder_cache(torch.zeros(V, dtype=torch.long))
    worst, ids = torch.full((V,), float("inf"), dtype=torch.float64), cand[:, None]
    for pos in range(length - 1, length + decode):
        probe.clear()
        logits = step(model, ids, cache)
        worst = torch.minimum(worst, quality(probe.margins(torch.tensor([pos]), logits))[:, 0])
        ids = logits[:, -1].argmax(-1)[:, None]
    tokens.append(int(worst.argmax()))
    return np.array(tokens, dtype=np.int64)


def float64_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """The same model in float64 (its internal float32 casts widened; inverse rope frequencies keep their float32
    values), to measure float32 rounding noise."""
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as M

    class Wide:
        def __getattr__(self, k):
            return torch.float64 if k == "float32" else getattr(torch, k)

    wide = copy.deepcopy(model).double()
    old_float, old_torch = torch.Tensor.float, M.torch
    try:
        torch.Tensor.float = lambda self: self.double()
        M.torch = Wide()
        return wide(ids, use_cache=False).logits
    finally:
        torch.Tensor.float, M.torch = old_float, old_torch


def mtp_reference(path: Path, cfg: dict, model, tensors: dict, streams: torch.Tensor, next_ids: torch.Tensor):
    """Next-token-prediction block. transformers ships none, so this composes transformers' decoder layer (a sliding
    layer with a biased router) with the projections of the original code:
    x = e_proj(enorm(embed(next_ids)))[:, :, None] + h_proj(hnorm(streams)); block(x); hc head; norm; head."""
    from transformers import DeepseekV4Config
    from transformers.masking_utils import create_sliding_window_causal_mask
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as M

    n = cfg["num_hidden_layers"]
    conf = copy.deepcopy({**cfg, "num_hidden_layers": n + 1, "num_nextn_predict_layers": 0})  # it edits its arguments
    conf.pop("quantization_config", None)
    conf = DeepseekV4Config(**conf)
    conf._attn_implementation = "eager"
    conf._experts_implementation = "eager"
    layer = M.DeepseekV4DecoderLayer(conf, n)
    state = layer.state_dict()
    for name, t in tensors.items():
        if name.startswith("mtp.0.") and name[6:].split(".")[0] in (
                "attn", "ffn", "attn_norm", "ffn_norm", "hc_attn_fn", "hc_attn_base", "hc_attn_scale",
                "hc_ffn_fn", "hc_ffn_base", "hc_ffn_scale"):
            key, idx = hf_target(f"layers.{n}." + name[6:], cfg)
            state[key.removeprefix(f"model.layers.{n}.")][idx if idx is not None else ...] = t
    layer.load_state_dict(state)
    layer.eval()
    w = {k[6:]: v for k, v in tensors.items() if k.startswith("mtp.0.")}
    eps = cfg["rms_norm_eps"]
    norm = lambda x, g: g * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))
    e = norm(tensors["embed.weight"][next_ids], w["enorm.weight"])
    x = (e @ w["e_proj.weight"].T).unsqueeze(2) + norm(streams, w["hnorm.weight"]) @ w["h_proj.weight"].T
    pos = torch.arange(next_ids.shape[1])[None]
    mask = create_sliding_window_causal_mask(config=conf, inputs_embeds=e, attention_mask=None, past_key_values=None,
                                             position_ids=pos)
    rope = {k: model.model.rotary_emb(e, position_ids=pos, layer_type=k) for k in ("main", "compress")}
    x = layer(x, position_embeddings=rope, position_ids=pos, attention_mask=mask, input_ids=next_ids,
              past_key_values=None)
    hc = M.DeepseekV4HyperHead(conf)
    hc.load_state_dict({"hc_fn": w["hc_head_fn"], "hc_base": w["hc_head_base"], "hc_scale": w["hc_head_scale"]})
    return norm(hc(x), w["norm.weight"]) @ tensors["head.weight"].T

"""Does the data see a bug? Perturb each tensor, and break the semantics one rule at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from oracle_cases import full_config
from oracle_checkpoint import draw_checkpoint, quantise_checkpoint
from oracle_reference import hf_target, load_reference


def mutate(name: str, case: dict, out: Path) -> None:
    from transformers.activations import ACT2FN
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as M

    cfg = full_config(case)
    path = out / "ckpt" / name
    tensors = draw_checkpoint(cfg, case["seed"], case.get("gains", {}))
    if "quantization_config" in cfg:
        _, tensors = quantise_checkpoint(tensors)
    model = load_reference(path, cfg, tensors)
    spec = case["inputs"][0]
    with np.load(out / "data" / f"{name}__{spec['name']}.npz") as z:
        ids, want, noise = torch.from_numpy(z["input_ids"].astype(np.int64)), torch.from_numpy(z["logits"]), \
            float(z["float32_noise"])

    def effect(m=None):
        return float((((m or model)(ids, use_cache=False).logits) - want).abs().max())

    print(f"{name}: noise {noise:.1e}, unmutated {effect():.1e}, logits std {want.std():.2f}")
    state, worst = dict(model.named_parameters()) | dict(model.named_buffers()), []
    g = torch.Generator().manual_seed(0)
    for orig in tensors:
        if orig.startswith("mtp."):
            continue
        key, idx = hf_target(orig, cfg)
        view = state[key].data if idx is None else state[key].data[idx]
        keep = view.clone()
        if keep.dtype == torch.int64:
            view.copy_((keep + 1) % cfg["n_routed_experts"])
        elif ".indexer." in orig or orig.endswith("gate.bias"):  # act through a selection only: shuffle the values
            view.copy_(keep.flatten()[torch.randperm(keep.numel(), generator=g)].view(keep.shape))
        else:  # 2% relative noise
            view.add_(0.02 * keep.abs().mean() * torch.randn(keep.shape, generator=g))
        worst.append((effect(), orig))
        view.copy_(keep)
    worst.sort()
    print("  weakest tensors (2% noise; indexer and gate.bias shuffled):", [(f"{e:.1e}", n) for e, n in worst[:5]])

    def patched(obj, attr, new):
        old = getattr(obj, attr)
        setattr(obj, attr, new)
        try:
            return effect()
        finally:
            setattr(obj, attr, old)

    res = {}
    app = M.apply_rotary_pos_emb

    def half_split(x, cos, sin, unsqueeze_dim=1):
        cos, sin = (torch.cat([v, v], -1).unsqueeze(unsqueeze_dim) for v in (cos, sin))
        r = cos.shape[-1]
        a, b = x[..., :-r], x[..., -r:]
        h = r // 2
        return torch.cat([a, b * cos + torch.cat([-b[..., h:], b[..., :h]], -1) * sin], -1)

    res["rope half-split pairing"] = patched(M, "apply_rotary_pos_emb", half_split)
    res["rope on leading dims"] = patched(M, "apply_rotary_pos_emb", lambda x, c, s, unsqueeze_dim=1: torch.roll(
        app(torch.roll(x, -2 * c.shape[-1], -1), c, s, unsqueeze_dim), 2 * c.shape[-1], -1))

    def no_inverse(x, cos, sin, unsqueeze_dim=1):  # the inverse call is the one on heads with sin(position 1) < 0
        inverse = x.shape[1:3] == (cfg["num_attention_heads"], ids.shape[1]) and sin[0, 1, 0] < 0
        return x if inverse else app(x, cos, sin, unsqueeze_dim)

    res["no inverse rope on output"] = patched(M, "apply_rotary_pos_emb", no_inverse)
    res["no sink"] = patched(M, "eager_attention_forward", _no_sink(M))
    for mod_cls, label in ((M.DeepseekV4Experts, "routed"), (M.DeepseekV4MLP, "shared")):
        mods = [m for m in model.modules() if type(m) is mod_cls]
        for m in mods:
            m.limit = 1e9
        res[f"{label} experts not clamped"] = effect()
        for m in mods:
            m.limit = cfg["swiglu_limit"]
    hcs = [m for m in model.modules() if isinstance(m, M.DeepseekV4HyperConnection)]
    for label, attr, new in (("sinkhorn 19 of 20 iterations", "hc_sinkhorn_iters", cfg["hc_sinkhorn_iters"] - 1),
                             ("sinkhorn 1 iteration", "hc_sinkhorn_iters", 1), ("hc_eps 0", "hc_eps", 0.0)):
        old = getattr(hcs[0], attr)
        for m in hcs:
            setattr(m, attr, new)
        res[label] = effect()
        for m in hcs:
            setattr(m, attr, old)
    gates = [m for m in model.modules() if isinstance(m, (M.DeepseekV4TopKRouter, M.DeepseekV4HashRouter))]
    for m in gates:
        m.routed_scaling_factor /= 1.1
    res["routed scale / 1.1"] = effect()
    for m in gates:
        m.routed_scaling_factor = cfg["routed_scaling_factor"]
    old = gates[0].score_fn
    for m in gates:
        m.score_fn = ACT2FN["sqrtsoftplus" if cfg["scoring_func"] == "sigmoid" else "sigmoid"]
    res["other scoring func"] = effect()
    for m in gates:
        m.score_fn = old
    old = M.DeepseekV4HyperConnection.forward

    def untransposed(self, x):
        post, comb, col = old(self, x)
        return post, comb.transpose(-1, -2), col

    res["comb transposed"] = patched(M.DeepseekV4HyperConnection, "forward", untransposed)
    old_win = model.config.sliding_window
    for w in (old_win - 1, old_win + 1):
        model.config.sliding_window = w
        res[f"window {w - old_win:+d}"] = effect()
    model.config.sliding_window = old_win
    idx = [m for m in model.modules() if isinstance(m, M.DeepseekV4Indexer)]
    if idx:
        for k in (cfg["index_topk"] - 1, cfg["index_topk"] + 1, 10**6):
            for m in idx:
                m.index_topk = k
            res[f"index_topk {k}"] = effect()
        for m in idx:
            m.index_topk = cfg["index_topk"]
        F = torch.nn.functional
        old = F.relu
        F.relu = lambda v: v
        res["indexer without relu"] = effect()
        F.relu = old
    rotary = [m for m in model.modules() if isinstance(m, M.DeepseekV4RotaryEmbedding)]
    if any(cfg["compress_ratios"][: cfg["num_hidden_layers"]]):
        keep = [m.compress_inv_freq for m in rotary]
        plain = 1.0 / cfg["compress_rope_theta"] ** (torch.arange(0, cfg["qk_rope_head_dim"], 2).float()
                                                     / cfg["qk_rope_head_dim"])
        for m in rotary:
            m.compress_inv_freq = plain
        if "rope_scaling" in cfg:
            res["no yarn"] = effect()
        for m in rotary:
            m.compress_inv_freq = m.main_inv_freq
        res["main rope everywhere"] = effect()
        for m, k in zip(rotary, keep):
            m.compress_inv_freq = k
        attn = [m for m in model.modules() if isinstance(m, M.DeepseekV4Attention)]
        labels = [m.rope_layer_type for m in attn]
        for m in attn:
            m.rope_layer_type = "main"
        res["main rope on q/kv of compressed layers"] = effect()
        for m, k in zip(attn, labels):
            m.rope_layer_type = k
        comps = [m.compressor for m in attn if m.compressor is not None]
        for m in comps:
            def late(x, position_ids, layer_type, f=m.rotary_emb.forward, r=m.compress_rate):
                return f(x, position_ids=position_ids + r - 1, layer_type=layer_type)
            m.rotary_emb.forward = late
        res["compressed entries roped at the window's last token"] = effect()
        for m in comps:
            del m.rotary_emb.forward
        for cls, label in ((M.DeepseekV4HCACompressor, "HCA"), (M.DeepseekV4Indexer, "CSA")):
            if not any(isinstance(m, cls) for m in model.modules()):
                continue
            old = cls.forward

            def shifted(self, h, q, position_ids, *rest):
                if isinstance(self, M.DeepseekV4HCACompressor):
                    return old(self, h, q, position_ids - 1, *rest)
                picks = old(self, h, q, position_ids, *rest)  # drop the entry that becomes visible exactly here
                newest = ((position_ids + 1) // self.compress_rate - 1)[..., None]
                fresh = ((position_ids + 1) % self.compress_rate == 0)[..., None]
                return torch.where(fresh & (picks == newest), -1, picks)

            res[f"{label} entry visible one token late"] = patched(cls, "forward", shifted)
        overlap = [m for m in model.modules() if isinstance(m, (M.DeepseekV4CSACompressor, M.DeepseekV4Indexer))]
        if overlap:
            def swap():
                for m in overlap:
                    d = m.head_dim
                    for t in (m.kv_proj.weight.data, m.gate_proj.weight.data, m.position_bias.data.T):
                        t.copy_(torch.cat([t[d:], t[:d]]).clone())
            swap()
            res["CSA overlap halves swapped"] = effect()
            swap()
    biased = [m for m in gates if isinstance(m, M.DeepseekV4TopKRouter)]
    if biased:
        old = M.DeepseekV4TopKRouter.forward

        def with_bias(self, x):
            logits, _, idx = old(self, x)
            w = (self.score_fn(logits) + self.e_score_correction_bias).gather(1, idx)
            return logits, w / w.sum(-1, keepdim=True) * self.routed_scaling_factor, idx

        def unnormalised(self, x):
            logits, _, idx = old(self, x)
            return logits, self.score_fn(logits).gather(1, idx) * self.routed_scaling_factor, idx

        res["router bias used in the weights"] = patched(M.DeepseekV4TopKRouter, "forward", with_bias)
        res["router weights not normalised"] = patched(M.DeepseekV4TopKRouter, "forward", unnormalised)
    if not all(cfg["compress_ratios"][: cfg["num_hidden_layers"]]):
        keep = model.model.rotary_emb.main_inv_freq
        model.model.rotary_emb.main_inv_freq = model.model.rotary_emb.compress_inv_freq
        res["compress rope on sliding layers"] = effect()
        model.model.rotary_emb.main_inv_freq = keep
    for m in [m for m in model.modules() if isinstance(m, M.DeepseekV4UnweightedRMSNorm)]:
        m.eps *= 10
    res["unweighted-norm eps x10"] = effect()
    for label, e in sorted(res.items(), key=lambda kv: kv[1]):
        print(f"  {e:9.2e}  {label}")


def _no_sink(M):
    def f(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        k, v = (M.repeat_kv(x, module.num_key_value_groups) for x in (key, value))
        w = torch.matmul(query, k.transpose(2, 3)) * scaling + attention_mask
        return torch.matmul(w.softmax(-1), v).transpose(1, 2).contiguous(), w
    return f

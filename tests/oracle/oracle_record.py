"""What is recorded of one input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from oracle_reference import float64_logits, mtp_reference, new_cache, step


def record(model, probe, cfg: dict, spec: dict, ids: np.ndarray, tensors: dict, path: Path) -> dict[str, np.ndarray]:
    out = {"input_ids": ids.astype(np.int32)}
    t = torch.from_numpy(ids)
    B, S = t.shape
    probe.clear()
    hidden = model.model(t, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden)
    got = dict(probe.got)
    margins = probe.margins(torch.arange(S), logits)
    out["logits"], out["final_hidden"] = logits.numpy(), hidden.numpy()
    noise = float((float64_logits(model, t) - logits).abs().max())
    out["float32_noise"] = np.float64(noise)

    probe_trace = spec.get("trace")
    n = cfg["num_hidden_layers"]
    for i in range(n):
        if ("topk", i) in got:
            out[f"topk_indices.{i}"] = got["topk", i].numpy().astype(np.int16)
        _, weights, indices = got["gate", i]
        if probe_trace:
            out[f"expert_indices.{i}"] = indices.view(B, S, -1).numpy().astype(np.int16)
            out[f"expert_weights.{i}"] = weights.view(B, S, -1).numpy()
            if ("compressed", i) in got:
                out[f"compressed_kv.{i}"] = got["compressed", i][:, 0].numpy()
            if ("index", i) in got:
                out[f"indexer_keys.{i}"] = got["index", i][1].numpy()
    if probe_trace:
        P = torch.tensor(probe_trace)
        embed = model.model.embed_tokens(t).unsqueeze(2).expand(-1, -1, cfg["hc_mult"], -1)
        out["trace_positions"] = P.numpy().astype(np.int32)
        out["streams"] = torch.stack([embed[:, P]] + [got["streams", i][:, P] for i in range(n)]).numpy()
        out["attn_out"] = torch.stack([got["attn_out", i][:, P] for i in range(n)]).numpy()
        out["ffn_out"] = torch.stack([got["ffn_out", i][:, P] for i in range(n)]).numpy()
    if spec.get("mtp"):
        out["mtp_next_ids"] = ids[:, 1:].astype(np.int32)
        out["mtp_streams_in"] = got["streams", n - 1][:, :-1].numpy()
        out["mtp_logits"] = mtp_reference(path, cfg, model, tensors, got["streams", n - 1][:, :-1], t[:, 1:]).numpy()

    diffs = {}
    if spec.get("decode"):
        cache = new_cache(model)
        last = step(model, t, cache)[:, -1]
        diffs["prefill"] = float((last - logits[:, -1]).abs().max())
        tokens, steps = [], [last]
        dm = []
        for j in range(spec["decode"]):
            tokens.append(last.argmax(-1))
            probe.clear()
            last = step(model, tokens[-1][:, None], cache)
            dm.append(probe.margins(torch.tensor([S + j]), last))
            last = last[:, -1]
            steps.append(last)
        out["decode_tokens"] = torch.stack(tokens, 1).numpy().astype(np.int32)
        out["decode_logits"] = torch.stack(steps, 1).numpy()
        full = model(torch.cat([t, torch.stack(tokens, 1)], 1), use_cache=False).logits
        diffs["decode"] = float((full[:, S - 1:] - torch.stack(steps, 1)).abs().max())
        margins = {k: torch.cat([v] + [d[k] for d in dm], 1) for k, v in margins.items()}
    if spec.get("chunks"):
        assert sum(spec["chunks"]) == S
        cache, parts, at = new_cache(model), [], 0
        for c in spec["chunks"]:
            parts.append(step(model, t[:, at:at + c], cache))
            at += c
        chunked = torch.cat(parts, 1)
        diffs["chunked"] = float((chunked - logits).abs().max())
        out["chunk_sizes"] = np.array(spec["chunks"], np.int32)
        ends = np.cumsum(spec["chunks"]) - 1
        out["chunk_end_logits"] = chunked[:, ends].numpy()
    for k, v in margins.items():
        out[f"min_margin_{k}"] = np.float64(v.min())
    for k, v in diffs.items():
        out[f"self_diff_{k}"] = np.float64(v)
    return out

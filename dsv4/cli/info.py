"""`dsv4 info`: a config in numbers. Imports neither jax nor flax, so that it answers at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dsv4.cli import output
from dsv4.cli.arguments import Config, JsonFile, Overrides
from dsv4.cli.source import named_config
from dsv4.config import CACHE_FORMATS, LayerConfig, ModelConfig
from dsv4.cost import (
    bytes_per_token,
    compressor_state_bytes,
    count_parameters,
    dense_multihead_bytes_per_token,
    weight_bytes,
    window_bytes,
)

SHOWN = ("bf16", "fp8", "fp8_fp4_index")


@dataclass(frozen=True)
class Info:
    """What a model is and costs, from its config alone: no weight is read.

    examples:
      dsv4 info flash
      dsv4 info pro --json pro.json
      dsv4 info tiny --set model.moe.experts=64 --set model.layers=window,csa:4,hca:128*3
      dsv4 info path/to/checkpoint
    """

    config: Config
    set: Overrides = ()
    json: JsonFile = None

    def run(self) -> None:
        named = named_config(self.config, self.set)
        with output.json_file(self.json) as write:
            facts = model_facts(named.name, named.model)
            write(facts)
        _print(facts, named.model)


def model_facts(name: str, config: ModelConfig) -> dict[str, Any]:
    """Everything `dsv4 info` says, as plain data; bytes are exact."""
    parameters = count_parameters(config)
    return {
        "name": name,
        "parameters": {"total": parameters.total, "active": parameters.active, "mtp": parameters.mtp},
        "layers": [str(layer) for layer in config.layers],
        "schedule": schedule(config.layers),
        "max_context": config.max_context,
        "weights": {
            "bytes": weight_bytes(config),
            "dtype": config.storage.dtype,
            "dense": config.storage.dense,
            "experts": config.storage.experts,
        },
        "cache": {
            name: {
                "bytes_per_token": bytes_per_token(config, form),
                "window_bytes": window_bytes(config, form),
            }
            for name, form in CACHE_FORMATS.items()
            if name in SHOWN
        },
        "open_block_bytes": compressor_state_bytes(config),
        "dense_multihead_bytes_per_token": dense_multihead_bytes_per_token(config),
    }


def schedule(layers: Sequence[LayerConfig]) -> str:
    """Layers in short: `window x2, (csa:4, hca:128) x20, csa:4`."""
    return ", ".join(_repeats([str(layer) for layer in layers]))


def _repeats(words: list[str]) -> Iterator[str]:
    """Greedy: at each place the period whose repeats cover most, the shortest of those."""
    at = 0
    while at < len(words):
        periods = range(1, (len(words) - at) // 2 + 1)
        period = max(periods, key=lambda p: (_covered(words, at, p), -p), default=1)
        covered = _covered(words, at, period)
        if covered:
            block = ", ".join(words[at : at + period])
            yield f"{block if period == 1 else f'({block})'} x{covered // period}"
        else:
            yield words[at]
        at += covered or 1


def _covered(words: list[str], at: int, period: int) -> int:
    """How many words from `at` on are whole repeats of the first `period`; 0 unless there are two."""
    end = at + period
    while words[end : end + period] == words[at : at + period]:
        end += period
    return end - at if end > at + period else 0


def _print(facts: dict[str, Any], config: ModelConfig) -> None:
    parameters, weights = facts["parameters"], facts["weights"]
    attention, moe = config.attention, config.moe
    total, active, mtp = (output.count(parameters[part]) for part in ("total", "active", "mtp"))
    rows = [
        ("parameters", f"{total} total, {active} active per token"),
        ("MTP blocks", f"{config.mtp_blocks}, with {mtp} parameters more"),
        ("layers", f"{len(config.layers)}: {facts['schedule']}"),
        ("width, vocabulary", f"{config.width:,}, {config.vocab_size:,}"),
        ("attention", f"{attention.heads} heads of {attention.head_dim}, window {attention.window}"),
        ("experts", f"{moe.experts} routed, {moe.per_token} per token; {moe.shared} shared"),
        ("context", f"{config.max_context:,} tokens"),
        ("weights", f"{output.size(weights['bytes'])}: {_formats(weights)}"),
        ("open blocks", f"{output.size(facts['open_block_bytes'])} a sequence, float32"),
    ]
    output.table(rows, ("", ""), title=facts["name"])
    print()
    _print_cache(facts, config.max_context)


def _print_cache(facts: dict[str, Any], context: int) -> None:
    dense = facts["dense_multihead_bytes_per_token"]
    rows = []
    for name, cache in facts["cache"].items():
        token = cache["bytes_per_token"]
        smaller = f"{dense / token:,.0f}x smaller" if token else "-"
        window = output.size(cache["window_bytes"])
        rows.append((name, f"{token:,.0f} B", smaller, output.size(token * context), window))
    rows.append(("dense multi-head, bf16", f"{dense:,} B", "", output.size(dense * context), "none"))
    headers = ("cache", "per token", "against dense", f"at {context:,} tokens", "windows, a sequence")
    output.table(rows, headers)


def _formats(weights: dict[str, Any]) -> str:
    quantised = [f"{part} {weights[part]}" for part in ("dense", "experts") if weights[part] != "plain"]
    return ", ".join([*quantised, f"rest {weights['dtype']}"]) if quantised else weights["dtype"]

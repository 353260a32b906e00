"""The schedule of layers in the released `config.json`: which layer is which, and which file is another model's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from dsv4.config.layers import released_layer
from dsv4.config.model import LayerConfig
from dsv4.config.released_keys import LAYER_TYPES, expected

DSPARK = (
    "this checkpoint has dspark stages instead of MTP blocks (a later release of V4-Flash, 46 compress_ratios), "
    "which dsv4 does not support yet; use the first release"
)
_DSPARK_HINT = re.compile("dspark|markov|confidence_head", re.IGNORECASE)


def is_dspark(raw: dict[str, Any]) -> bool:
    """Whether three stages follow the layers, or more than one MTP block, or anything names the later release."""
    mtp, count, ratios = (raw.get(key) for key in ("num_nextn_predict_layers", "num_hidden_layers", "compress_ratios"))
    stages = isinstance(mtp, int) and mtp > 1
    stages |= isinstance(count, int) and isinstance(ratios, list) and len(ratios) - 3 == count > 0
    return stages or _DSPARK_HINT.search(repr(raw | {"_name_or_path": None})) is not None


def schedule(raw: dict[str, Any]) -> tuple[LayerConfig, ...]:
    """The layers of a file in which `wrong_schedule` finds nothing."""
    return tuple(released_layer(ratio) for ratio in raw["compress_ratios"][: raw["num_hidden_layers"]])


def wrong_schedule(raw: dict[str, Any]) -> Iterator[str]:
    """Problems of the four keys that say which layer is which."""
    count, ratios = raw.get("num_hidden_layers"), raw.get("compress_ratios")
    missing = [key for key in ("num_hidden_layers", "compress_ratios") if key not in raw]
    yield from (f"{key} is missing" for key in missing)
    whole = expected(count, int) is None and count != 0
    if not whole and "num_hidden_layers" not in missing:
        yield f"num_hidden_layers is {count!r}, expected an integer of at least 1"
    listed = isinstance(ratios, list) and all(expected(ratio, int) is None and ratio != 1 for ratio in ratios)
    if not listed and "compress_ratios" not in missing:
        yield f"compress_ratios is {ratios!r}, expected a list of integers: 0, or at least 2"
    if not whole or not listed:
        return
    assert isinstance(count, int) and isinstance(ratios, list)
    mtp = raw.get("num_nextn_predict_layers") or 0
    if len(ratios) - count not in (0, mtp) or any(ratios[count:]):
        yield (
            f"compress_ratios has {len(ratios)} entries for num_hidden_layers {count}, the last {ratios[count:]}: "
            f"one a layer, then nothing or a 0 for each of num_nextn_predict_layers {mtp}"
        )
        return
    layers = schedule(raw)
    names = [LAYER_TYPES[layer.kind] for layer in layers]
    if raw.get("layer_types") not in (None, names):
        yield f"layer_types {raw['layer_types']!r} contradicts compress_ratios {ratios!r}"
    rates = raw.get("compress_rates")
    for name, rate in rates.items() if isinstance(rates, dict) else ():
        used = sorted({layer.ratio for layer, kind in zip(layers, names, strict=True) if kind == name})
        if problem := expected(rate, int):
            yield f"compress_rates.{name} is {rate!r}, {problem}"
        elif used not in ([], [rate]):
            yield f"compress_rates.{name} is {rate} but compress_ratios has {used}"

"""The layer schedule as text, and the number behind which the released format hides a layer."""

from __future__ import annotations

import re
import typing
from typing import Any

from dsv4.config.errors import ConfigError
from dsv4.config.model import LayerConfig

_WORD = re.compile(r"(?:(?P<kind>[a-z]+)(?::(?P<ratio>\d+))?|(?P<code>\d+))(?:\*(?P<times>[1-9]\d*))?")


def parse_layers(text: str) -> tuple[LayerConfig, ...]:
    """`window,csa:4,hca:128,full`, a `*N` behind a kind repeats it; released integer codes are taken too."""
    layers: list[LayerConfig] = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        try:
            layers += _repeated(word)
        except ValueError as error:
            raise ConfigError(f"layers: cannot read {word!r} ({error}); write e.g. window,csa:4,hca:128*3") from error
    return tuple(layers)


def _repeated(word: str) -> list[LayerConfig]:
    match = _WORD.fullmatch(word)
    if match is None:
        raise ValueError("expected KIND, KIND:RATIO or a released code, then an optional *TIMES")
    kind, ratio, code, times = match.group("kind", "ratio", "code", "times")
    layer = released_layer(int(code)) if code else LayerConfig(typing.cast(Any, kind), int(ratio or 0))
    return [layer] * int(times or 1)


def released_layer(ratio: int) -> LayerConfig:
    """The layer behind one number of the released `compress_ratios`: 0 window, 4 CSA, anything else HCA."""
    if ratio == 0:
        return LayerConfig("window")
    return LayerConfig("csa" if ratio == 4 else "hca", ratio)

"""Calibration: from a text to what a conversion needs to know about the inputs of each weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv4.config import ConfigError, ModelConfig
from dsv4.config.recipe import Recipe
from dsv4.config.storage import TREATED_CLASSES, untreated_input
from dsv4.decoding.inputs import InputError
from dsv4.decoding.text import encode, load_tokenizer
from dsv4.model.handle import Model
from dsv4.parameters import leaves, model_specs, tensor_name
from dsv4.quantize.observe import observe_inputs
from dsv4.quantize.static_scale import Method, input_scale
from dsv4.quantize.weights import largest_channels
from pallas_kernels.formats import format_name

WINDOW, MOST_WINDOWS = 512, 64  # tokens, and how many windows of them are enough


@dataclass(frozen=True)
class WeightCalibration:
    """Of one weight. input_scale: static, None where scales are computed as inputs come. channel_amax float32 [in]."""

    input_scale: float | None
    channel_amax: np.ndarray


Calibration = dict[str, WeightCalibration]  # by tensor name


def has_static_scales(recipe: Recipe) -> bool:
    """Whether calibration gives `recipe` static scales: they are float32, other activations keep dynamic ones.

    Raises ConfigError where calibration would change nothing.
    """
    form = recipe.activations
    static = form is not None and form.scale == "float32" and (recipe.dense or recipe.experts) is not None
    if not static and not recipe.outlier_channels:
        raise ConfigError(
            f"calibration would change nothing: activations are {format_name(form)}, whose scales stay dynamic (a "
            "static scale is one float32, as for fp8_row or int8_row), and outlier_channels is 0"
        )
    return static


def calibrate(
    model: Model,
    windows: np.ndarray,
    recipe: Recipe,
    method: Method = "absmax",
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Statistics of every dense and expert weight of the 16-bit `model` over token ids `windows` [N, T], and its scale.

    With outlier channels the text is read twice: which channels those are decides what the scale has to cover. Raises
    ConfigError for a recipe that this changes nothing for, or an input that is not finite.
    """
    static = has_static_scales(recipe)
    passes = 2 if static and recipe.outlier_channels else 1

    def report(at: int) -> Callable[[int, int], None]:
        return lambda done, total: progress(at * total + done, passes * total) if progress else None

    seen = observe_inputs(model, windows, rotate=recipe.rotate, progress=report(0))
    inputs = seen
    if passes == 2:
        channels = {name: largest_channels(found.channel_amax, recipe.outlier_channels) for name, found in seen.items()}
        inputs = observe_inputs(model, windows, channels=channels, rotate=recipe.rotate, progress=report(1))
    scaled = _quantized_inputs(model.config, recipe) if static else set()
    return {
        name: WeightCalibration(
            input_scale(inputs[name], recipe.activations, method) if name in scaled and recipe.activations else None,
            found.channel_amax,
        )
        for name, found in seen.items()
    }


def text_windows(model: Model, path: Path) -> np.ndarray:
    """Token ids int32 [N, T] of the UTF-8 text in `path`: whole windows, spread over the text where it has many.

    Raises InputError for text that is not UTF-8, or shorter than one window; OSError.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from None
    return windows_of(model.config, encode(load_tokenizer(model), text), str(path))


def windows_of(config: ModelConfig, ids: list[int], origin: str) -> np.ndarray:
    """As `text_windows`, of token ids. Each window begins with the begin id, as texts do."""
    length = min(WINDOW, config.max_context)
    count = len(ids) // (length - 1)
    if count == 0:
        raise InputError(f"{origin} has {len(ids)} tokens: calibration needs at least {length - 1}, one window")
    chosen = np.linspace(0, count - 1, min(count, MOST_WINDOWS)).round().astype(int)
    windows = np.asarray(ids[: count * (length - 1)], np.int32).reshape(count, length - 1)[chosen]
    return np.pad(windows, ((0, 0), (1, 0)), constant_values=config.bos_id)


def _quantized_inputs(config: ModelConfig, recipe: Recipe) -> set[str]:
    """Names of the weights whose input is quantised."""
    formats = {"dense": recipe.dense, "expert": recipe.experts}
    return {
        name
        for path, spec in leaves(model_specs(config))
        if spec.kind in TREATED_CLASSES
        and formats[spec.kind] is not None
        and not untreated_input(name := tensor_name(path))
    }


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Writes `calibration` to `path` (.npz), whole or not at all."""
    arrays: dict[str, Any] = {f"{name} amax": found.channel_amax for name, found in calibration.items()}
    arrays |= {
        f"{name} scale": np.float32(found.input_scale)
        for name, found in calibration.items()
        if found.input_scale is not None
    }
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    partial.replace(path)


def load_calibration(path: Path) -> Calibration:
    """What `save_calibration` wrote, bit for bit."""
    with np.load(path, allow_pickle=False) as arrays:
        names = [key.removesuffix(" amax") for key in arrays.files if key.endswith(" amax")]
        return {
            name: WeightCalibration(
                float(arrays[f"{name} scale"]) if f"{name} scale" in arrays.files else None, arrays[f"{name} amax"]
            )
            for name in names
        }

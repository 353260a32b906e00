"""Evaluates recipes: the same windows and prompts through every variant of a model.

Memory: the weights of all variants are kept at once (what a recipe leaves alone is shared, not copied), but logits only
of the baseline and one variant for one batch of windows: LOGIT_BYTES each, or a single window's where that is more, and
a few times that while they are compared. So the baseline runs once a batch, however many recipes there are, and nothing
as wide as a vocabulary reaches the host.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dsv4.config import Recipe
from dsv4.decoding.generate import check_room
from dsv4.evaluate.compare import Sums, compare, full_pass
from dsv4.evaluate.greedy import continuation
from dsv4.evaluate.rows import Measured, Row, make_row
from dsv4.evaluate.settings import Settings
from dsv4.evaluate.text import spread
from dsv4.evaluate.variants import with_baseline
from dsv4.model.handle import Model
from dsv4.quantize.weights import quantize_model
from dsv4.training.data import EvalWindows

AS_STORED = "as stored"
LOGIT_BYTES = 1 << 25
Report = Callable[[int, int], None]


def evaluate(
    model: Model, recipes: Sequence[Recipe], windows: EvalWindows, settings: Settings, report: Report | None = None
) -> list[Row]:
    """A row for the baseline and each of `recipes`, which quantise `model`; its execution says how all are run.

    report: called with (steps done, steps in all). Raises ConfigError for a model that is quantised already or a shape
    that a recipe cannot hold, InputError where prompts and new tokens do not fit the context.
    """
    prompts = _prompts(windows, settings)
    if len(prompts):
        check_room(prompts.shape[1], settings.new_tokens, model.config)
    variants = {recipe.name: quantize_model(model, recipe) for recipe in with_baseline(recipes)}
    measured = _measure(variants, windows, prompts, settings, report)
    baseline = next(iter(measured.values()))
    return [make_row(name, variants[name], found, baseline, windows, settings) for name, found in measured.items()]


def evaluate_as_stored(model: Model, windows: EvalWindows, settings: Settings, report: Report | None = None) -> Row:
    """The row of a model as it is: bits per byte and bytes, with nothing to compare to."""
    measured = _measure({AS_STORED: model}, windows, np.zeros((0, 1), np.int32), settings, report)
    return make_row(AS_STORED, model, measured[AS_STORED], None, windows, settings)


def _measure(
    variants: dict[str, Model], windows: EvalWindows, prompts: np.ndarray, settings: Settings, report: Report | None
) -> dict[str, Measured]:
    """Runs `variants`, of which the first is the baseline."""
    batch = batch_size(windows, next(iter(variants.values())).config.vocab_size)
    batches = list(windows.batches(batch))
    total, done = len(variants) * (len(batches) + (len(prompts) > 0)), itertools.count(1)
    parts: dict[str, list[Sums]] = {name: [] for name in variants}
    tokens: dict[str, np.ndarray | None] = dict.fromkeys(variants)
    for inputs, scored in batches:
        baseline = None
        for name, model in variants.items():
            sums, baseline = _one_batch(model, inputs, scored, baseline)
            parts[name].append(sums)
            if report is not None:
                report(next(done), total)
    for name, model in variants.items() if len(prompts) else ():
        tokens[name] = continuation(model, prompts, settings.new_tokens)
        if report is not None:
            report(next(done), total)
    return {name: Measured(Sums.joined(parts[name], len(windows)), tokens[name]) for name in variants}


def _one_batch(model: Model, tokens: np.ndarray, scored: np.ndarray, baseline: tuple | None) -> tuple[Sums, tuple]:
    """Sums of windows tokens [B, L + 1], and what to compare the next variant with: this one's pass where none is."""
    seen = full_pass(model, jnp.asarray(tokens[:, :-1]))
    baseline = baseline or seen
    ratios = tuple(layer.ratio for layer in model.config.layers if layer.kind == "csa")
    found = compare(*seen, *baseline, jnp.asarray(tokens[:, 1:]), jnp.asarray(scored), ratios=ratios)
    return jax.device_get(found), baseline


def batch_size(windows: EvalWindows, vocab: int) -> int:
    """Windows that run together: as many as have LOGIT_BYTES of float32 logits, at least 1."""
    length = windows.scored.shape[1]
    return max(1, min(LOGIT_BYTES // (4 * length * vocab), len(windows)))


def _prompts(windows: EvalWindows, settings: Settings) -> np.ndarray:
    """Where continuations start: the beginnings of `prompts` windows, int32 [P, T]."""
    if not settings.prompts:
        return np.zeros((0, 1), np.int32)
    return spread(windows, settings.prompts).tokens[:, : min(settings.prompt_tokens, settings.length)]
